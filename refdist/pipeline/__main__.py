"""``python -m refdist.pipeline``: the rules side by side for a model, and the best partition."""

import argparse
import math
from collections.abc import Callable, Sequence

from refdist.pipeline.best import OBJECTIVES, best_partition
from refdist.pipeline.catalog import DEVICES, MODELS, find_device, find_model
from refdist.pipeline.compare import compare, table
from refdist.pipeline.cost import room_bytes
from refdist.pipeline.serving import Serving

_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the comparison."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        model, device = find_model(options.model), find_device(options.device)
        if options.stages > model.num_hidden_layers:
            parser.error(
                f"argument --stages: {options.stages}: must be at most "
                f"{model.num_hidden_layers}, the layers of {model.name}"
            )
        serving = Serving(
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            bytes_per_weight=_BYTES[options.weights],
            bytes_per_kv_element=_BYTES[options.kv_cache],
            memory_share=options.memory_share,
            reserved_bytes=options.reserved_gib * 2**30,
        )
        rows = compare(model, device, options.stages, options.objective, serving)
        best = best_partition(model, device, options.stages, options.objective, serving)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{model.name} ({options.weights} layers, bf16 ends) on {options.stages} x {device.name}, "
        f"{room_bytes(device, serving) / 2**30:.2f} GiB a stage for weights and cache; "
        f"{serving.prompt_tokens} + {serving.output_tokens} tokens a request"
    )
    print(table(rows))
    print(f"best for {options.objective}:")
    print(best)


def _parser() -> argparse.ArgumentParser:
    count = _number(int, lambda n: n >= 1, "at least 1")
    share = _number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    room = _number(float, lambda x: 0 <= x < math.inf, "finite, at least 0")
    parser = argparse.ArgumentParser(prog="python -m refdist.pipeline", description=__doc__)
    parser.add_argument("--model", required=True, help=", ".join(MODELS))
    parser.add_argument("--device", required=True, help=", ".join(DEVICES))
    parser.add_argument("--stages", required=True, type=count)
    parser.add_argument("--objective", choices=OBJECTIVES, default="mix", help="of the best")
    parser.add_argument("--prompt-tokens", type=count, default=1024)
    parser.add_argument("--output-tokens", type=count, default=256)
    parser.add_argument("--weights", choices=_BYTES, default="bf16", help="of the layers")
    parser.add_argument("--kv-cache", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--memory-share", type=share, default=0.9)
    parser.add_argument("--reserved-gib", type=room, default=0.0, help="of it, for other things")
    return parser


def _number(
    kind: type[int] | type[float], fits: Callable[[float], bool], rule: str
) -> Callable[[str], float]:
    """Return a parser for an argument. Argparse puts the option's name before the error."""

    def read(text: str) -> float:
        number = kind(text)
        if not fits(number):
            raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
        return number

    read.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return read


if __name__ == "__main__":
    main()
