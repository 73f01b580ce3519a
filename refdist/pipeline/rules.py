"""The rules by which engines cut a model into pipeline stages, each under its field's name.

Every rule is a pure function with one signature, ``rule(num_hidden_layers, pp_size, weights)``, and
returns the layers of each stage in order, as ranges. Only ``by_weight`` reads the weights. A rule
that cannot divide the layers raises a ValueError; one that leaves a stage without layers returns an
empty range, and ``faults`` says so in words.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from refdist.checks import check_integer
from refdist.pipeline.balance import balanced_cuts
from refdist.pipeline.specification import spread_remainder


class Rule(Protocol):
    """What every rule is."""

    def __call__(
        self, num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
    ) -> list[range]:
        """Cut a model into stages.

        Args:
            num_hidden_layers: layers of the model, at least 0.
            pp_size: number of stages, at least 1.
            weights: of the embedding, of each layer, and of the norm and head together:
                ``num_hidden_layers + 2`` numbers of any unit. None weighs each of them 1.

        Returns:
            The layers of each stage, in order.

        Raises:
            ValueError: an argument is out of its range, or the rule has no answer to it.
        """
        ...


def specification(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The remainder goes to the stages before the last, backwards. The rule of ``get_pp_indices``.

    Used by vLLM since pull request 13839. Called "middle" where stages 0 and P - 1 get none.
    """
    _divide(num_hidden_layers, pp_size)
    return _ranges(spread_remainder(num_hidden_layers, pp_size))


def remainder_last(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The whole remainder goes to the last stage.

    Used by vLLM before pull request 13839, and by SGLang and TensorRT-LLM at first.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges([quotient] * (pp_size - 1) + [quotient + remainder])


def front(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """One layer more for each of the first stages, as ``torch.tensor_split`` does it.

    Used by TensorRT-LLM, which refuses more stages than layers, and by picotron.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges(quotient + (stage < remainder) for stage in range(pp_size))


def end(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """One layer more for each of the last stages.

    Used by SGLang since pull request 13977, and proposed for vLLM in pull request 46217.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges(quotient + (stage >= pp_size - remainder) for stage in range(pp_size))


def lighter_ends(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The first and the last stage give layers up, and each stage between takes one more.

    What remains is dealt out one by one, from the last stage backwards. From vLLM pull request
    6920, as ``less_layer_in_first_last_partition``; it was never the default.

    Raises:
        ValueError: the ends would hold fewer than no layers; or the number of stages is odd and
            divides the layers, when the rule deals out one layer more than there is.
    """
    quotient, _ = _divide(num_hidden_layers, pp_size)
    if pp_size <= 2:
        return remainder_last(num_hidden_layers, pp_size)
    at_ends = quotient - (pp_size - 2) // 2
    what = f"lighter ends: {num_hidden_layers} layers on {pp_size} stages"
    if at_ends < 0:
        raise ValueError(f"{what}: the ends would hold {at_ends} layers; must be at least 0")
    counts = [at_ends, *[quotient + 1] * (pp_size - 2), at_ends]
    left_over = num_hidden_layers - sum(counts)
    if left_over < 0:
        raise ValueError(
            f"{what}: the rule would deal out {sum(counts)}; an odd number of stages must not "
            f"divide the layers"
        )
    for stage in range(pp_size - left_over, pp_size):
        counts[stage] += 1
    return _ranges(counts)


def embedding_and_head_counted(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The embedding and the head count as a layer each, and what remains goes to the front.

    Used by torchtitan. With as many stages as layers and ends, the ends hold no layer.

    Raises:
        ValueError: there are more stages than layers and ends.
    """
    _divide(num_hidden_layers, pp_size)
    if pp_size > num_hidden_layers + 2:
        raise ValueError(
            f"embedding and head counted: {pp_size} stages for {num_hidden_layers} layers, an "
            f"embedding and a head: must be at most {num_hidden_layers + 2}"
        )
    return _without_ends(front(num_hidden_layers + 2, pp_size), num_hidden_layers)


def embedding_and_head_divisible(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The embedding and the head count as a layer each, and nothing may remain.

    Used by Megatron-core with ``account_for_embedding_in_pipeline_split`` and
    ``account_for_loss_in_pipeline_split``.

    Raises:
        ValueError: the layers and the two ends do not divide by the number of stages.
    """
    _divide(num_hidden_layers, pp_size)
    if (num_hidden_layers + 2) % pp_size:
        raise ValueError(
            f"embedding and head divisible: {num_hidden_layers} layers, an embedding and a head "
            f"do not divide by {pp_size} stages"
        )
    return embedding_and_head_counted(num_hidden_layers, pp_size)


def by_weight(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The heaviest and the lightest stage differ by as little as a dynamic programme can find.

    Used by DeepSpeed as ``partition_method="parameters"``, with parameter counts as weights. The
    embedding and the head are items of their own there, so a stage may hold one of them and no
    layer.

    Raises:
        ValueError: there are not ``num_hidden_layers + 2`` weights, or one is below 0.
    """
    _divide(num_hidden_layers, pp_size)
    items = tuple([1.0] * (num_hidden_layers + 2) if weights is None else map(float, weights))
    if len(items) != num_hidden_layers + 2 or min(items) < 0:
        raise ValueError(
            f"weights: {len(items)} of them, the least {min(items, default=0):g}: must be "
            f"{num_hidden_layers + 2} (embedding, layers, head), each at least 0"
        )
    cuts = balanced_cuts(items, pp_size)
    stages = [range(first, after) for first, after in pairwise(cuts)]
    return _without_ends(stages, num_hidden_layers)


def own_count_times_rank(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """WRONG, and kept to be looked at: each stage starts at its own count times its number.

    A stage with one layer more than those before it starts too late, so that the layers between
    are on no stage, and the last stage reaches for layers that the model has not. mlx-lm did this
    until pull request 1816 (issue 1688). Nothing raises: the model loads, runs and gives answers.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    counts = [quotient + (stage >= pp_size - remainder) for stage in range(pp_size)]
    starts = [min(stage * count, num_hidden_layers) for stage, count in enumerate(counts)]
    return [range(s, min(s + n, num_hidden_layers)) for s, n in zip(starts, counts, strict=True)]


RULES: dict[str, Rule] = {
    "specification": specification,
    "remainder last": remainder_last,
    "front": front,
    "end": end,
    "lighter ends": lighter_ends,
    "embedding and head counted": embedding_and_head_counted,
    "embedding and head divisible": embedding_and_head_divisible,
    "by weight": by_weight,
}
"""The rules that put every layer on exactly one stage, by name."""


def faults(stages: Sequence[range], num_hidden_layers: int) -> list[str]:
    """What is wrong with a partition, in words: nothing, if every stage has layers of its own.

    Args:
        stages: the layers of each stage.
        num_hidden_layers: layers of the model.

    Returns:
        A sentence for each fault: stages without layers, layers on no stage, and on several.
    """
    held = [layer for stage in stages for layer in stage]
    empty = [number for number, stage in enumerate(stages) if not stage]
    missing = sorted(set(range(num_hidden_layers)) - set(held))
    twice = sorted({layer for layer in held if held.count(layer) > 1})
    found = {
        "stages without layers": empty,
        "layers on no stage": missing,
        "layers on several stages": twice,
    }
    return [f"{what}: {', '.join(map(str, which))}" for what, which in found.items() if which]


def _divide(num_hidden_layers: int, pp_size: int) -> tuple[int, int]:
    num_hidden_layers = check_integer("num_hidden_layers", num_hidden_layers)
    if num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers={num_hidden_layers}: must be at least 0")
    if check_integer("pp_size", pp_size) < 1:
        raise ValueError(f"pp_size={pp_size}: must be at least 1")
    return divmod(num_hidden_layers, pp_size)


def _ranges(counts: Iterable[int]) -> list[range]:
    stages, start = [], 0
    for count in counts:
        stages.append(range(start, start + count))
        start += count
    return stages


def _without_ends(stages: Sequence[range], num_hidden_layers: int) -> list[range]:
    """Layers, from items of which the first is the embedding and the last the head."""
    counts = [len(range(max(s.start, 1), min(s.stop, num_hidden_layers + 1))) for s in stages]
    return _ranges(counts)
