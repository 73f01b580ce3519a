"""``python -m refdist.pipeline``: the rules side by side for a model, and the best partition."""

import math
from collections.abc import Sequence

from refdist.command_line import Parser, at_least, number, run
from refdist.pipeline.best import OBJECTIVES, best_partition
from refdist.pipeline.catalog import DEVICES, MODELS, find_device, find_model
from refdist.pipeline.compare import compare, table
from refdist.pipeline.cost import room_bytes
from refdist.pipeline.serving import Serving

_PROG = "python -m refdist.pipeline"
_BYTES = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the comparison."""
    parser = make_parser()
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


def make_parser() -> Parser:
    """The parser of the command line."""
    share = number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    room = number(float, lambda x: 0 <= x * 2**30 < math.inf, "finite, at least 0")
    tokens = number(int, lambda n: 1 <= n <= 10**9, "at least 1 and at most 1,000,000,000")
    parser = Parser(
        prog=_PROG,
        description="Compare the rules by which engines give the layers of a model to the stages "
        "of a pipeline, and print the best partition, as the value for VLLM_PP_LAYER_PARTITION.",
        examples=[
            f"{_PROG} --model llama-3.1-70b --device l4 --stages 8",
            f"{_PROG} --model phi-4 --device l4 --stages 4 --objective kv_blocks --weights fp8",
        ],
    )
    parser.add_argument("--model", required=True, help=", ".join(MODELS))
    parser.add_argument("--device", required=True, help=", ".join(DEVICES))
    parser.add_argument(
        "--stages", required=True, type=at_least(1), help="how many, at most one a layer"
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="mix", help="(%(default)s)")
    parser.add_argument(
        "--prompt-tokens", type=tokens, default=1024, help="of a request (%(default)s)"
    )
    parser.add_argument(
        "--output-tokens", type=tokens, default=256, help="of a request (%(default)s)"
    )
    parser.add_argument(
        "--weights", choices=_BYTES, default="bf16", help="of the layers (%(default)s)"
    )
    parser.add_argument("--kv-cache", choices=("bf16", "fp8"), default="bf16", help="(%(default)s)")
    parser.add_argument(
        "--memory-share", type=share, default=0.9, help="of the device's memory (%(default)s)"
    )
    parser.add_argument(
        "--reserved-gib", type=room, default=0.0, help="of it, for other things (%(default)g)"
    )
    return parser


if __name__ == "__main__":
    run(main)
