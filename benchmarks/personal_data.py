"""Precision on real text, and recall on planted numbers, of the cleaning of personal data.

`python benchmarks/personal_data.py --text FOLDER [FOLDER ...] --out benchmarks/results/personal_data.json`

Every replacement in the texts below the folders (prose, code, changelogs) is listed with `--list FILE`, to be labelled by
hand: a label is `true` or `false` under the replacement's key in `benchmarks/results/personal_data_labels.json`, which holds no
text. Planted numbers have the usual written forms of 20 countries, with random digits that the numbering plan allows, in
sentences of the texts: half of them after a word for phone, half without one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import phonenumbers
from common import RESULTS

from rlhf.data_prep.prepare.personal import replace_personal_data, replacements

LABELS = RESULTS / "personal_data_labels.json"
#: Written forms by country, international first: N stands for a digit, a group in braces for one of several prefixes.
FORMS = {
    "US": ["+1 {212|415|305}-{2|3|6}NN-NNNN", "+1 ({212|415|305}) {2|3|6}NN-NNNN", "({212|415|305}) {2|3|6}NN-NNNN",
           "{212|415|305}-{2|3|6}NN-NNNN", "{212|415|305}.{2|3|6}NN.NNNN", "+1{212|415|305}{2|3|6}NNNNNN"],
    "CN": ["+86 {138|159|186} NNNN NNNN", "{138|159|186}-NNNN-NNNN", "{138|159|186} NNNN NNNN", "010-{6|8}NNN NNNN",
           "(021) {5|6}NNNNNNN", "+86{138|159|186}NNNNNNNN"],
    "GB": ["+44 20 {7|8}NNN NNNN", "+44 (0)20 {7|8}NNN NNNN", "020 {7|8}NNN NNNN", "(020) {7|8}NNN NNNN",
           "07{700|911|712} NNNNNN", "+447{700|911|712}NNNNNN"],
    "DE": ["+49 30 {2|3|4}NNNNNN", "+49 (0)30 {2|3|4}NNNNNN", "030 {2|3|4}NNNNNN", "030/{2|3|4}NNNNNN",
           "(089) {2|3|4}NNNNNN", "0{151|160|171} {1|2|3}NNNNNNN"],
    "FR": ["+33 1 {42|44|53} NN NN NN", "+33 (0)1 {42|44|53} NN NN NN", "01 {42|44|53} NN NN NN",
           "01.{42|44|53}.NN.NN.NN", "06 {12|23|61} NN NN NN", "06-{12|23|61}-NN-NN-NN"],
    "IT": ["+39 06 {4|5|6}NNN NNNN", "+39 {333|340|347} NNN NNNN", "06 {4|5|6}NNN NNNN", "02-{4|5|6}NNNNNNN",
           "{333|340|347} NNN NNNN", "{333|340|347}-NNNNNNN"],
    "ES": ["+34 91 {4|5}NN NN NN", "+34 {612|654|678} NNN NNN", "91 {4|5}NN NN NN", "{612|654|678} NNN NNN",
           "{612|654|678} NN NN NN", "{612|654|678}-NNN-NNN"],
    "NL": ["+31 20 {4|5|6}NN NNNN", "+31 6 {12|24|53}NN NNNN", "020 {4|5|6}NN NNNN", "020-{4|5|6}NNNNNN",
           "06-{12|24|53}NNNNNN", "06 {12|24|53}NN NNNN"],
    "BE": ["+32 2 {5}NN NN NN", "+32 {470|485|496} NN NN NN", "02 {5}NN NN NN", "02/{5}NN.NN.NN",
           "0{470|485|496} NN NN NN", "0{470|485|496}/NN.NN.NN"],
    "CH": ["+41 44 {2|3|4}NN NN NN", "+41 {76|78|79} {2|3|4}NN NN NN", "044 {2|3|4}NN NN NN",
           "0{76|78|79} {2|3|4}NN NN NN", "0{76|78|79}-{2|3|4}NN-NN-NN", "(044) {2|3|4}NN NN NN"],
    "AT": ["+43 1 {5}NNNNNN", "+43 {664|676|699} {1|2|3}NNNNNN", "01 {5}NNNNNN", "01/{5}NNNNNN",
           "0{664|676|699} {1|2|3}NNNNNN", "(01) {5}NNNNNN"],
    "PL": ["+48 22 {6|8}NN NN NN", "+48 {501|602|793} NNN NNN", "22 {6|8}NN NN NN", "{501|602|793} NNN NNN",
           "{501|602|793}-NNN-NNN", "(22) {6|8}NN NN NN"],
    "SE": ["+46 8 {5|6}NN NNN NN", "+46 70 {2|3|6}NN NN NN", "08-{5|6}NN NNN NN", "070-{2|3|6}NN NN NN",
           "070 {2|3|6}NN NN NN", "(08) {5|6}NN NNN NN"],
    "JP": ["+81 3-{3|5|6}NNN-NNNN", "+81 90-{1|2|3}NNN-NNNN", "03-{3|5|6}NNN-NNNN", "090-{1|2|3}NNN-NNNN",
           "090 {1|2|3}NNN NNNN", "(03) {3|5|6}NNN-NNNN"],
    "KR": ["+82 2-{3|5|7}NN-NNNN", "+82 10-{2|3|5}NNN-NNNN", "02-{3|5|7}NN-NNNN", "010-{2|3|5}NNN-NNNN",
           "010 {2|3|5}NNN NNNN", "(02) {3|5|7}NN-NNNN"],
    "IN": ["+91 {98|99|70}NNN NNNNN", "+91-{98|99|70}NNNNNNNN", "+91 22 2{2|3|6}NN NNNN", "0{98|99|70}NNN NNNNN",
           "022-2{2|3|6}NNNNNN", "{98|99|70}NNN NNNNN"],
    "BR": ["+55 11 9{6|7|8}NNN-NNNN", "+55 (11) 9{6|7|8}NNN-NNNN", "(11) 9{6|7|8}NNN-NNNN", "(21) {2|3}NNN-NNNN",
           "11 9{6|7|8}NNN-NNNN", "(11) {2|3}NNN NNNN"],
    "MX": ["+52 55 {5}NNN NNNN", "+52 33 {3}NNN NNNN", "55 {5}NNN NNNN", "(55) {5}NNN NNNN", "55-{5}NNN-NNNN", "33 {3}NNN NNNN"],
    "AU": ["+61 2 {9}NNN NNNN", "+61 4{12|23|33} NNN NNN", "02 {9}NNN NNNN", "(02) {9}NNN NNNN",
           "04{12|23|33} NNN NNN", "04{12|23|33}-NNN-NNN"],
    "RU": ["+7 495 {7|9}NN-NN-NN", "+7 (495) {7|9}NN-NN-NN", "8 (495) {7|9}NN-NN-NN", "8 {903|916|926} NNN-NN-NN",
           "8-{903|916|926}-NNN-NN-NN", "8({903|916|926})NNN-NN-NN"],
}  # fmt: skip
NAMED = ("Tel. {}", "call me at {}", "Phone: {}", "手机：{}", "my mobile is {}")
PLAIN = ("{}", "({})", "Mr Lee, {},", "office {}", "ask at {}")
#: What each kind but a phone number is planted as; the second of a pair is no such thing.
OTHERS = {
    "[EMAIL]": ("{w}.{w}@{w}.org", "{w}+{d}@mail.{w}.co.uk"),
    "[CARD]": ("4{c}", "card 4{r}"),
    "[IP]": ("{b}.{b}.{b}.1{d}{d}", "server {b}.{b}.{b}.{b}", "2001:db9::{d}a{d}", "2a00:1450:4001:8{d}{d}::200e"),
}


def texts(folders: list[Path], megabytes: float) -> Iterator[tuple[str, str]]:
    """Names and contents of text files, the same ones each time; JSON files as their strings."""
    endings = {".md", ".rst", ".txt", ".py", ".json", ".jsonl", ".pyi", ".c", ".h", ".html", ".tex", ".1", ".csv", ""}
    for place in folders:
        files, total = sorted(f for f in place.rglob("*") if f.suffix.lower() in endings or f.name == "METADATA"), 0
        random.Random(0).shuffle(files)
        for file in files:
            if total > megabytes * 1e6 or not file.is_file() or "phonenumbers" in str(file):
                continue
            raw = file.read_bytes()[:1_000_000]
            if b"\0" not in raw:
                total += len(raw)
                yield file.name, raw.decode("utf-8", "replace")


def key(name: str, mark: str, original: str) -> str:
    """The name of a replacement in the file of labels."""
    return hashlib.sha256(f"{name}\0{mark}\0{original}".encode()).hexdigest()[:16]


def found(sample: list[tuple[str, str]]) -> dict[str, tuple[str, str, str]]:
    """Mark, original and surroundings of each replacement, by key."""
    result = {}
    for name, text in sample:
        for of in replacements(text)[1]:
            mark, original = of.mark, of.original
            at = max(text.find(original), 0)
            around = " ".join(text[max(0, at - 60) : at + len(original) + 25].split())
            result[key(name, mark, original)] = (mark, original, f"{name}: {around}")
    return result


def written(form: str, region: str, rng: random.Random) -> str:
    """A number of a written form that the country's numbering plan allows."""
    for _ in range(1000):
        number = re.sub(r"\{([^}]*)\}", lambda m: rng.choice(m[1].split("|")), form)
        number = re.sub("N", lambda _: str(rng.randrange(10)), number)
        if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
            return number
    raise ValueError(f"{region} has no number of the form {form}")


def recall(sentences: list[str], per_form: int, rng: random.Random) -> dict[str, Any]:
    """Shares of planted numbers of which no digit is left, by country, form and context."""
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    missed: Counter[str] = Counter()
    for region, forms in FORMS.items():
        for form in forms:
            for i in range(per_form):
                number, place = written(form, region, rng), rng.choice((NAMED, PLAIN)[i % 2])
                text = f"{rng.choice(sentences)} {place.format(number)} {rng.choice(sentences)}"
                hit = number not in replace_personal_data(text) and number in [
                    of.original for of in replacements(text)[1]
                ]
                context = "after a word for phone" if i % 2 == 0 else "without one"
                for group in (region, "all", context, "international" if form[0] == "+" else "national"):
                    hits[group].append(hit)
                if not hit:
                    missed[f"{region} {form} {context}"] += 1
    return {
        "recall": {group: round(sum(of) / len(of), 4) for group, of in hits.items()},
        "planted": len(hits["all"]),
        "missed": dict(missed.most_common()),
    }


def other_recall(sentences: list[str], count: int, rng: random.Random) -> dict[str, float]:
    """Share of planted addresses and cards that are replaced, by mark."""

    def card() -> str:
        head = "4" + "".join(str(rng.randrange(10)) for _ in range(14))
        doubled = [d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(map(int, reversed(head)))]
        return head[1:] + str(-sum(doubled) % 10)

    def fill(form: str) -> str:
        form = re.sub(r"\{w\}", lambda _: "".join(rng.choices("abcdefgh", k=5)), form)
        form = re.sub(r"\{d\}", lambda _: str(rng.randrange(1, 9)), form)
        form = re.sub(r"\{b\}", lambda _: str(rng.choice([23, 45, 62, 81, 93, 141, 185, 203])), form)
        digits = card()
        return form.replace("{r}", digits).replace("{c}", f"{digits[:3]} {digits[3:7]} {digits[7:11]} {digits[11:]}")

    def hit(mark: str, form: str) -> bool:
        return mark in replace_personal_data(f"{rng.choice(sentences)} {fill(form)} {rng.choice(sentences)}")

    return {mark: sum(hit(mark, forms[i % len(forms)]) for i in range(count)) / count for mark, forms in OTHERS.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=40, help="of each folder")
    parser.add_argument("--per_form", type=int, default=20)
    parser.add_argument("--list", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    sample = list(texts(args.text, args.megabytes))
    size, start = sum(len(text.encode()) for _, text in sample) / 1e6, time.perf_counter()
    for _, text in sample:
        replace_personal_data(text)
    seconds = time.perf_counter() - start
    spans = found(sample)
    labels = json.loads(LABELS.read_text()) if LABELS.is_file() else {}
    if args.list:
        args.list.write_text(
            "".join(f"{k}\t{m}\t{o!r}\t{around}\n" for k, (m, o, around) in spans.items()), encoding="utf-8"
        )
    judged = {
        mark: [labels[k] for k, (m, _, _) in spans.items() if m == mark and k in labels]
        for mark in ("[PHONE]", "[IP]", "[CARD]", "[EMAIL]", "[KEY]")
    }
    prose = [
        s.strip()
        for _, text in sample
        for s in re.split(r"(?<=[.!?])\s+", text)
        if 30 < len(s) < 150 and re.fullmatch(r"[A-Z][A-Za-z ,']+[.!?]", s)
    ]
    result = {
        "text": {"files": len(sample), "megabytes": round(size, 1), "megabytes_per_second": round(size / seconds, 2)},
        "replaced": dict(Counter(mark for mark, _, _ in spans.values())),
        "precision": {
            mark: {"labelled": len(of), "precision": round(sum(of) / len(of), 4)} for mark, of in judged.items() if of
        },
        "phones": recall(prose, args.per_form, rng),
        "others": other_recall(prose, 400, rng),
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
