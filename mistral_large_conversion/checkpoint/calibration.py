"""What quantized weights were calibrated with: the facts that manifest, model card and `inspect` state."""

from dataclasses import asdict, dataclass
from typing import Any

# A change of the algorithm that changes the codes is another method.
METHOD = "GPTQ"
REVISION = 1


@dataclass(frozen=True)
class Calibration:
    """The data and the settings that quantized weights were calibrated with.

    data: the name of the file, without its folder; "default" for the one that this package brings.
    data_sha256: of the bytes of that file.
    samples, length, tokens: sequences, the most tokens that one may have, and the tokens of all.
    tokens_sha256: of the token ids, four bytes each, so of data, prompt format and vocabulary.
    damping: what is added to the diagonal of each Hessian, as a share of its mean.
    device, dtype: where and in what the activations were computed.
    """

    data: str
    data_sha256: str
    samples: int
    length: int
    tokens: int
    tokens_sha256: str
    damping: float
    device: str
    dtype: str
    method: str = METHOD
    revision: int = REVISION

    @property
    def description(self) -> str:
        """One line for people."""
        return (
            f"{self.method} on {self.samples} sequences, {self.tokens:,} tokens, of {self.data} "
            f"(sha256 {self.data_sha256[:12]}…)"
        )

    def to_json(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return asdict(self)
