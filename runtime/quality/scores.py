"""What a model's logits say of a text's tokens, and how far they are from a reference's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from layerpack.runtime.quality.figures import Figure, exponential, mean, quantile, share

ROWS_AT_A_TIME = 64
"""Rows of logits that are looked at in float32 together, which bounds the memory."""


@dataclass(slots=True)
class Scores:
    """One value for each token that was scored, in order.

    `losses` and `reference_losses`: minus the log-probability of the token, in nats. `divergences`:
    the KL divergence of the model's distribution from the reference's, sum p_ref (log p_ref -
    log p). `same_first`: whether both hold the same token for the likeliest.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    reference_losses: list[torch.Tensor] = field(default_factory=list)
    divergences: list[torch.Tensor] = field(default_factory=list)
    same_first: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, logits: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor | None = None
    ) -> None:
        """Score `tokens` (rows,) by logits (rows, vocabulary) of any float dtype, on any device."""
        for begin in range(0, len(tokens), ROWS_AT_A_TIME):
            rows = slice(begin, begin + ROWS_AT_A_TIME)
            found = logits[rows].float().log_softmax(-1)
            wanted = tokens[rows, None].to(found.device)
            self.losses.append(-found.gather(-1, wanted)[:, 0].cpu())
            if reference is None:
                continue
            true = reference[rows].to(found.device).float().log_softmax(-1)
            self.reference_losses.append(-true.gather(-1, wanted)[:, 0].cpu())
            divergence = (true.exp() * (true - found)).sum(-1)
            self.divergences.append(divergence.clamp(min=0).cpu())  # below 0 by rounding alone
            self.same_first.append((true.argmax(-1) == found.argmax(-1)).cpu())

    @property
    def num_tokens(self) -> int:
        """How many were scored."""
        return sum(map(len, self.losses))

    def figures(self) -> dict[str, Figure]:
        """What there is, by name; {} if nothing was scored."""
        if not self.losses:
            return {}
        found = {"perplexity": exponential(mean(torch.cat(self.losses)))}
        if self.divergences:
            divergences = torch.cat(self.divergences)
            found |= {
                "reference_perplexity": exponential(mean(torch.cat(self.reference_losses))),
                "kl_mean": mean(divergences),
                "kl_median": quantile(divergences, 0.5),
                "kl_99th_percentile": quantile(divergences, 0.99),
                "same_first_choice": share(torch.cat(self.same_first)),
            }
        return found
