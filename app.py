"""The web app: `python app.py`. Settings come from the environment; docs/web-app.md lists them."""

import os
import sys

from compress.errors import CompressError
from compress.ui.web.settings import Settings, prepare_environment


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
        prepare_environment(os.environ, settings)
        from compress.ui.web.server import serve  # imports Gradio, which reads the environment while it is imported

        serve(settings)
    except CompressError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
