"""How far two distributions over a vocabulary are apart, token by token, from blocks of their logits.

Logits [tokens, vocab_size] are never whole: the sums that all results need are kept while one block of the two output
matrices comes after the other. They are of float64, and shifted by the largest logit so far, as log_softmax is.
"""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import linear

from modeling_mistral_large.streamed.layer_stream import LayerStream


@dataclass(frozen=True)
class Divergence:
    """Float64 and bool values [tokens] on the CPU, in nats; `agrees`: both models have the same most likely token."""

    kl: Tensor
    agrees: Tensor
    loss_reference: Tensor
    loss_candidate: Tensor


class RunningSoftmax:
    """Log of the sum of exponentials, the largest logit and the logit of a target, of logits seen block by block."""

    def __init__(self, targets: Tensor) -> None:
        """targets: ids [tokens]."""
        self.targets = targets
        self.largest = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=targets.device)
        self.sums = torch.zeros_like(self.largest)
        self.target_logits = torch.zeros_like(self.largest)
        self.most_likely = torch.zeros_like(targets)

    def add(self, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add the logits [tokens, rows] of the ids from `start` on.

        Returns their exponentials, shifted by the largest logit so far, and by how much older sums shrink [tokens].
        """
        largest, place = logits.max(dim=-1)
        # Not of equal ones: of those, `argmax` takes the first.
        self.most_likely = torch.where(largest > self.largest, place + start, self.most_likely)
        shift = torch.maximum(self.largest, largest)
        shrink = (self.largest - shift).exp()
        exponentials = (logits - shift[:, None]).exp_()
        self.sums = self.sums * shrink + exponentials.sum(-1)
        self.largest = shift
        rows = self.targets - start
        is_here = (rows >= 0) & (rows < logits.shape[-1])
        found = logits.gather(-1, rows.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.target_logits = torch.where(is_here, found, self.target_logits)
        return exponentials, shrink

    def log_sums(self) -> Tensor:
        return self.largest + self.sums.log()

    def losses(self) -> Tensor:
        """Return the negative log-likelihoods of the targets [tokens]."""
        return self.log_sums() - self.target_logits


@torch.no_grad()
def measure_divergence(
    reference: LayerStream, candidate: LayerStream, hidden: tuple[Tensor, Tensor], targets: Tensor
) -> Divergence:
    """Compare what two models predict.

    hidden: the normed last hidden states [tokens, hidden_size] of the reference and of the candidate.
    targets: ids [tokens] that come next in the text.

    The candidate may have a larger vocabulary: the ids that the reference does not have take part in its softmax, as
    they do when it runs.
    """
    of_reference, of_candidate = hidden
    # Of the devices that torch knows, Apple's has no float64.
    device = "cpu" if reference.device.type == "mps" else reference.device
    targets = targets.to(device)
    expected, found = RunningSoftmax(targets), RunningSoftmax(targets)
    weighted = torch.zeros_like(expected.sums)
    for expected_block, found_block in zip_longest(reference.head_blocks(), candidate.head_blocks()):
        start, rows = found_block
        logits = linear(of_candidate, rows).to(device).double()
        found.add(start, logits)
        if expected_block is not None:
            start, rows = expected_block
            wanted = linear(of_reference, rows).to(device).double()
            exponentials, shrink = expected.add(start, wanted)
            weighted = weighted * shrink + (exponentials * (wanted - logits[:, : wanted.shape[-1]])).sum(-1)
    # KL = sum p (log p - log q) = sum p (x - y) - log sum exp x + log sum exp y, for logits x and y.
    kl = weighted / expected.sums - expected.log_sums() + found.log_sums()
    return Divergence(
        # Of equal distributions, rounding may leave less than nothing.
        kl=kl.clamp(min=0).cpu(),
        agrees=(expected.most_likely == found.most_likely).cpu(),
        loss_reference=expected.losses().cpu(),
        loss_candidate=found.losses().cpu(),
    )
