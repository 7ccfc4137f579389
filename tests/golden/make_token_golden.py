"""Makes `tokens.json` beside it, with TRL: `python -m tests.golden.make_token_golden` at the project's root."""

import json
import pathlib

from tests.golden.token_cases import cases, tokenizer_of, trained_by_trl

FILE = pathlib.Path(__file__).parent / "tokens.json"


def main():
    """Writes every case with the ids and labels that TRL's trainer makes of its rows."""
    written = []
    for name, tokenizer, rows, options, recipe in cases():
        trained = trained_by_trl(rows, tokenizer_of(tokenizer), **options)
        case = {"name": name, "tokenizer": tokenizer, "rows": rows, "recipe": recipe, "trained": trained}
        written.append(json.dumps(case, ensure_ascii=False, separators=(",", ":")))
    FILE.write_text("[\n" + ",\n".join(written) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
