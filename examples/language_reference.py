"""Write the Python language reference, which comes with every Python, as JSON Lines: English text without a download.

python examples/language_reference.py OUT.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def main(out: Path) -> None:
    with out.open("w", encoding="utf-8") as file:
        for topic, text in topics.items():
            file.write(json.dumps({"topic": topic, "text": text}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
