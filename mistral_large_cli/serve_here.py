"""Our own server behind `mistral-large serve`: its options, and what it loads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_large_conversion.errors import SettingError

from .generation_session import is_parallel, load_model
from .speculation import Drafting

# What vLLM calls the same.
VLLM_WORDS = {
    "--device-map": "it takes the GPUs of --tensor-parallel-size",
    "--kv": "it calls it --kv-cache-dtype",
    "--prefill-chunk": "it calls it --max-num-batched-tokens",
    "--max-batch": "it calls it --max-num-seqs",
    "--cors-origin": "it calls it --allowed-origins",
    "--ui": "it has no page",
}
# Options of `transformers serve`, which this server was before.
FORMER_OPTIONS = {
    "--device": "it is --device-map here",
    "--enable-cors": "it is --cors-origin '*' here",
    "--continuous-batching": "requests run at once anyway",
}


@dataclass(frozen=True)
class ServerSettings:
    """Options that only our server has, None where they are not given."""

    device_map: str | None = None
    kv: str | None = None
    prefill_chunk: int | None = None
    max_batch: int | None = None
    cors_origin: tuple[str, ...] = ()
    ui: bool = False

    def _given(self) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value]

    def refuse_with_vllm(self) -> None:
        """Refuse what vLLM does not have under these names.

        Raises:
            SettingError: the first of them.
        """
        for name in self._given():
            raise SettingError(
                f"{name}: no option of vLLM: {VLLM_WORDS[name]}; leave it out, or take --engine transformers"
            )

    def check(self, drafting: Drafting | None) -> None:
        """Refuse what has no effect, and origins that are none.

        Raises:
            SettingError: the first of them.
        """
        from urllib.parse import urlsplit

        for origin in self.cors_origin:
            parts = urlsplit(origin)
            is_site = parts.scheme in ("http", "https") and parts.netloc != ""
            if origin != "*" and not (is_site and origin == f"{parts.scheme}://{parts.netloc}"):
                raise SettingError(f"--cors-origin {origin}: must be * or a site as https://chat.example; correct it")
        if drafting is None:
            return
        for name in ("--kv", "--max-batch"):
            if name in self._given():
                raise SettingError(
                    f"{name}: has no effect with --draft or --lookup, where requests are served one after another; "
                    "leave one of the two out"
                )


def check_options(options: Sequence[str]) -> None:
    """Refuse options that the command does not declare: our server has no others.

    Raises:
        SettingError: the first of them.
    """
    for option in options:
        name = option.partition("=")[0]
        reason = FORMER_OPTIONS.get(name, "no option of the server without vLLM")
        raise SettingError(f"{name}: {reason}; leave it out; the options are in mistral-large serve --help")


def serve_here(
    model: str,
    *,
    host: str,
    port: int,
    names: Sequence[str],
    settings: ServerSettings,
    api_key: str | None = None,
    dtype: str | None = None,
    hub: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    drafting: Drafting | None = None,
    on_port: Callable[[int], None] | None = None,
) -> None:
    """Serve a checkpoint or an adapter in this process until it is stopped.

    port: 0 for a free one.
    names: of the model in requests.
    dtype: of the weights, as torch names it.
    hub: the options of `hub_options`.
    adapter: folder or repository of a LoRA to be loaded on the model.
    drafting: what drafts tokens; requests are then served one after another.
    on_port: called with the port when it is taken, before the model is loaded.

    Raises:
        SettingError: the port is taken, or the server runs in one of several processes.
        CheckpointError: no such checkpoint, one that cannot be loaded, or an adapter that does not fit.
    """
    from modeling_mistral_large.serving import serve
    from modeling_mistral_large.serving.server import take_port

    if is_parallel():
        raise SettingError("serve: our server runs in one process; leave torchrun out, or serve with vLLM")
    # Before weights are read, which may take an hour.
    listening = take_port(host, port)
    with listening:
        if on_port is not None:
            on_port(listening.getsockname()[1])
        place = {"dtype": dtype or "auto", "device_map": settings.device_map or "auto"}
        loaded, tokenizer = load_model(model, hub or {}, adapter=adapter, **place)
        serve(
            loaded,
            tokenizer,
            engine=make_engine(loaded, tokenizer, settings, drafting, place),
            host=host,
            port=port,
            listening=listening,
            model_names=names,
            api_key=api_key,
            cors_origins=settings.cors_origin,
            ui=settings.ui,
        )


def make_engine(
    model: Any, tokenizer: Any, settings: ServerSettings, drafting: Drafting | None, place: Mapping[str, str]
) -> Any:
    """Return what generates the responses: all at once or, with drafts, one after another."""
    if drafting is None:
        from modeling_mistral_large.serving import ContinuousBatching

        given = {"max_batch": settings.max_batch, "prefill_chunk": settings.prefill_chunk, "kv": settings.kv}
        own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return ContinuousBatching(model, **own)
    from modeling_mistral_large.serving import OneByOne

    options = drafting.generate_options(model, tokenizer, **place)
    if settings.prefill_chunk is not None:
        options["prefill_chunk_size"] = settings.prefill_chunk
    return OneByOne(model, **options)
