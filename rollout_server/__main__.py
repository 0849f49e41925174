"""`python -m rollout_server`: serve a model over HTTP."""

import os
import sys

from rollout_server.http.server.command_line import UsageError, read_settings
from rollout_server.http.server.model_files import check_model_argument
from rollout_server.http.server.phases import Phases


def main() -> int:
    """Exit code 2: the server cannot start as it was asked to. Heavy imports come after the arguments are checked."""
    phases = Phases()
    try:
        settings = read_settings()
        check_model_argument(settings.model)
        if not settings.serve:
            from rollout_server.http.server.listeners import bind

            for sock in bind(settings):
                sock.close()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    phases.begin("loading libraries")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rollout_server.http.server.serve import run

    return run(settings, phases)


if __name__ == "__main__":
    sys.exit(main())
