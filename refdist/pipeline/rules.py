"""The rules by which engines cut a model into pipeline stages, each under its usual name.

Every rule is a pure function with one signature, ``rule(num_hidden_layers, pp_size, weights)``. It
returns the layers of each stage in order, as ranges. Only ``by_weight`` reads the weights. A rule
that cannot divide the layers raises a ValueError. A stage without layers is an empty range, and
``faults`` reports it in words.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from refdist.checks import check_integer
from refdist.pipeline.balance import balanced_cuts
from refdist.pipeline.specification import spread_remainder


class Rule(Protocol):
    """The signature of every rule."""

    def __call__(
        self, num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
    ) -> list[range]:
        """Cut a model into stages.

        Args:
            num_hidden_layers: layers of the model, at least 0.
            pp_size: number of stages, at least 1.
            weights: weights of the embedding, of each layer, and of norm and head together:
                ``num_hidden_layers + 2`` numbers in any unit. None weighs each of them 1.

        Returns:
            The layers of each stage, in order.

        Raises:
            ValueError: an argument is out of its range, or the rule has no answer.
        """
        ...


def specification(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The remainder goes to the stages before the last, backwards, as in ``get_pp_indices``.

    vLLM uses it since pull request 13839. It is called "middle" if stages 0 and P - 1 get none.
    """
    _divide(num_hidden_layers, pp_size)
    return _ranges(spread_remainder(num_hidden_layers, pp_size))


def remainder_last(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The whole remainder goes to the last stage.

    vLLM used it before pull request 13839; SGLang and TensorRT-LLM used it at first.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges([quotient] * (pp_size - 1) + [quotient + remainder])


def front(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """Each of the first stages gets one layer more, as in ``torch.tensor_split``.

    TensorRT-LLM and picotron use it. TensorRT-LLM refuses more stages than layers.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges(quotient + (stage < remainder) for stage in range(pp_size))


def end(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """Each of the last stages gets one layer more.

    SGLang uses it since pull request 13977. Pull request 46217 proposes it for vLLM.
    """
    quotient, remainder = _divide(num_hidden_layers, pp_size)
    return _ranges(quotient + (stage >= pp_size - remainder) for stage in range(pp_size))


def lighter_ends(
    num_hidden_layers: int, pp_size: int, weights: Sequence[float] | None = None
) -> list[range]:
    """The first and the last stage get fewer layers, and each stage between gets one more.

    The remaining layers go out one by one, from the last stage backwards. The rule is
    ``less_layer_in_first_last_partition`` of vLLM pull request 6920. It was never the default.

    Raises:
        ValueError: an end would hold fewer than 0 layers; or the number of stages is odd and
            divides the layers, so that the rule would use one layer too many.
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
    """The embedding and the head count as a layer each. The remainder goes to the front.

    Torchtitan uses it. With as many stages as layers and ends, the ends hold no layer.

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
    """The embedding and the head count as a layer each. A remainder is refused.

    Megatron-core uses it with ``account_for_embedding_in_pipeline_split`` and
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
    """The heaviest and the lightest stage differ by the least that a dynamic programme finds.

    DeepSpeed uses it as ``partition_method="parameters"``, with parameter counts as weights. There
    the embedding and the head are separate items, so a stage may hold one of them and no layer.

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
    """WRONG, and kept as an example: each stage starts at its own count times its number.

    A stage with one layer more than those before it starts too late. So the layers between are on
    no stage, and the last stage asks for layers that do not exist. mlx-lm did this until pull
    request 1816 (issue 1688). No error is raised: the model loads, runs and gives answers.
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
    """The faults of a partition, in words. There are none if every stage has its own layers.

    Args:
        stages: the layers of each stage.
        num_hidden_layers: layers of the model.

    Returns:
        Texts such as ``"stages without layers: 3, 4"``; so for layers on no stage, or on several.
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
    """The layers of each stage, from items. The first item is the embedding, the last the head."""
    counts = [len(range(max(s.start, 1), min(s.stop, num_hidden_layers + 1))) for s in stages]
    return _ranges(counts)
