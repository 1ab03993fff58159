"""What a model is loaded from and saved as: both layouts of a checkpoint, adapters, quantized checkpoints."""

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from modeling_mistral_large.configuration_mistral_large import check_config
from modeling_mistral_large.transformers_api.models import HeadedModel, HostedModel


class LoadableModel(HostedModel):  # type: ignore[no-untyped-call]  # transformers types no __init_subclass__
    """Loading, saving and sharding, which all Mistral Large models share."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a folder or a repository on the hub, of the HF layout or, without conversion, of the vendor's
        consolidated layout.

        Of an adapter of PEFT, the base model is loaded, of either layout, and then the adapter. All options are
        transformers'. Where a folder has both layouts, the consolidated one is read. A checkpoint that `convert
        --quantize` wrote stays quantized in memory, see `quantized`.

        Raises:
            CheckpointError: a consolidated checkpoint that is not complete and sound, or an adapter without its base,
                where nothing was loaded; a quantization that transformers does not know, one that has quantized
                nothing, or tensors of a linear layer that have no place in the model.
            MissingLibraryError: a checkpoint quantized otherwise needs compressed-tensors.
        """
        # Imported here, because importing the package loads no more than stock Mistral does.
        from mistral_large_conversion.checkpoint.hub import CONSOLIDATED_FILES, find_consolidated, reachable_options
        from mistral_large_conversion.checkpoint.read import read_checkpoint
        from modeling_mistral_large.adapter_loading import (
            adapter_base,
            load_own_adapter,
            load_with_adapter,
            refuse_vendors_adapter,
        )
        from modeling_mistral_large.consolidated_loading import (
            default_generation_config,
            index_of,
            register_weight_conversions,
        )
        from modeling_mistral_large.hf_loading import check_folder, refuse_made_up
        from modeling_mistral_large.quantization.loading import config_for_loading, refuse_unquantized

        source = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        options = kwargs
        kwargs = reachable_options(source, options)
        folder = find_consolidated(source, kwargs, patterns=CONSOLIDATED_FILES)
        if folder is None:
            base = adapter_base(source, kwargs)
            if base is not None:
                return load_with_adapter(
                    cls, base, source, *model_args, config=config, output_loading_info=wants_info, **options
                )
            refuse_vendors_adapter(source, kwargs)
            is_checked = check_folder(source, config, kwargs, has_output_matrix=issubclass(cls, HeadedModel))
            register_weight_conversions()
            config = config_for_loading(cls, source, config, kwargs)
            loaded: Any = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **kwargs
            )
        else:
            is_checked = True
            refuse_vendors_adapter(folder, {})
            register_weight_conversions()
            checkpoint = read_checkpoint(folder, "consolidated", needs_tokenizer=False)
            kwargs.pop("subfolder", None)
            if kwargs.get("generation_config") is None:
                # Otherwise transformers looks for the config.json that is not there.
                kwargs["generation_config"] = default_generation_config()
            with index_of(list(checkpoint.tensors.values())) as index_folder:
                loaded = super().from_pretrained(
                    index_folder, *model_args, config=config or folder, output_loading_info=True, **kwargs
                )
            loaded[0].name_or_path = loaded[0].config.name_or_path = str(source)
            load_own_adapter(loaded[0], folder)
        model, info = loaded
        refuse_unquantized(model, source, info["unexpected_keys"], info["missing_keys"])
        if not is_checked:
            refuse_made_up(model, source, info["missing_keys"])
        return loaded if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save in the HF layout, whatever layout the model was loaded from.

        Raises:
            ValueError: `save_original_format`, which is off unless it is asked for.
            ConfigurationError: a config that was changed into one that cannot be loaded; nothing was written.
        """
        check_config(self.config)
        if kwargs.setdefault("save_original_format", False):
            raise ValueError(
                "save_original_format=True: the consolidated layout has files of its own, which transformers does not "
                "write; call mistral_large_conversion.export_checkpoint(model, folder)"
            )
        # `mistral-large adopt` gives the files of another checkpoint a second name: those are replaced, never written.
        for path in Path(save_directory).glob("model*.safetensors"):
            if path.is_symlink() or path.stat().st_nlink > 1:
                path.unlink()
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def open_weights(
        cls, files: Sequence[str], devices: Collection[Any]
    ) -> AbstractContextManager[dict[str, Any] | None]:
        """Stream what goes to a GPU, see `streamed_weights`."""
        from modeling_mistral_large.streamed_weights import streamed_weights

        return streamed_weights(files, devices)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Shard a model over the ranks, as transformers does.

        Raises:
            ValueError: key-value heads that cannot be sharded evenly.
        """
        key_heads = model.config.num_key_value_heads
        if distributed_config is not None and key_heads % (distributed_config.tp_size or 1):
            raise ValueError(
                f"tensor parallelism of {distributed_config.tp_size}: must divide the {key_heads} key-value heads, "
                "which are not sharded; use fewer ranks, or device_map instead"
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)
