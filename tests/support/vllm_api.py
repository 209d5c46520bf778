"""vLLM's own HTTP application, with its middleware and the plugin's routes but without an engine:
``python -m tests.support.vllm_api PORT [options of vllm serve]``."""

from __future__ import annotations

import sys

import uvicorn


def command(port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", __name__, str(port), *options]


def main() -> None:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    port, *options = sys.argv[1:]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "none", *options])
    uvicorn.run(build_app(args, ("generate",)), host="127.0.0.1", port=int(port), log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()
