"""lm-eval's own command with the model `moezoo` registered: `python -m moezoo.evaluation_harness --model moezoo ...`.

lm-eval up to 0.4.13 does not look for models in other packages; later ones do, and then `lm_eval` is enough.
"""

import sys

from moezoo.core.errors import MoezooError
from moezoo.core.extras import check_installed


def main() -> None:
    """Run lm-eval's command on the arguments of this one."""
    try:
        check_installed("lm_eval", purpose="the evaluation harness")
        import moezoo.evaluation_harness.model  # noqa: F401, I001  registers the model
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except MoezooError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
