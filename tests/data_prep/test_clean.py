"""Cleaning: each step does what it says and no more, is counted, and can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prepared import Built, text

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.prepare.clean import (
    Dropped,
    check_template,
    fix_control,
    fix_encoding,
    fix_width,
    has_content,
    strip_html,
    to_simplified,
    to_traditional,
)
from rlhf.data_prep.prepare.personal import replace_personal_data
from rlhf.data_prep.prepare.recipe import CLEANING_STEPS

Build = Callable[..., Built]


@pytest.mark.parametrize(
    ("mend", "before", "after"),
    [
        (fix_encoding, "cafÃ© schÃ¶n", "café schön"),
        (fix_encoding, "e\u0301", "é"),
        (fix_encoding, "“quotes” and ﬁ stay", "“quotes” and ﬁ stay"),
        (fix_encoding, "ｆｕｌｌ width is another step", "ｆｕｌｌ width is another step"),
        (fix_encoding, "&amp; is another step", "&amp; is another step"),
        (fix_control, "a\x00b\x1b[31mc\u200bd\ufeff", "ab[31mcd"),
        (fix_control, "one\r\ntwo\rthree\u2028four\tfive", "one\ntwo\nthree\nfour\tfive"),
        (fix_control, "👨\u200d👩 می\u200cخواهم", "👨\u200d👩 می\u200cخواهم"),
        (strip_html, "<p>One</p><p>two <b>bold</b> &amp; done</p>", "\nOne\n\ntwo bold & done\n"),
        (strip_html, "a<br/>b<!-- no --><script>x()</script>", "a\nb"),
        (strip_html, "if a < b and c > d", "if a < b and c > d"),
        (strip_html, "use `<b>` or ```\n<p>&amp;</p>\n``` here", "use `<b>` or ```\n<p>&amp;</p>\n``` here"),
        (strip_html, "a generic List<String> stays", "a generic List<String> stays"),
        (fix_width, "ＡＢＣ１２３　你好，世界！", "ABC123 你好，世界！"),
        (to_simplified, "這部電影很好看", "这部电影很好看"),
        (to_simplified, "この電影は國です", "この電影は國です"),
        (to_simplified, "plain", "plain"),
        (to_traditional, "这部电影很好看", "這部電影很好看"),
    ],
)
def test_mending(mend: Callable[[str], str], before: str, after: str) -> None:
    """Catches: a step that leaves what it is for, or touches what it is not for (code, Japanese, Persian, emoji)."""
    assert mend(before) == after
    assert mend(after) == after, "a second time must change nothing"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("write to jane.doe+x@mail.example.co.uk, please", "write to [EMAIL], please"),
        ("@handle and a@b are none", "@handle and a@b are none"),
        ("call +49 30 901820 or (650) 253-0000", "call [PHONE] or [PHONE]"),
        ("手机13812345678，谢谢", "手机[PHONE]，谢谢"),
        ("in 2023, 1500 of 20,000 at 3.14159265358979", "in 2023, 1500 of 20,000 at 3.14159265358979"),
        ("card 4111 1111 1111 1111 expires", "card [CARD] expires"),
        ("not a card 4111 1111 1111 1112 x", "not a card 4111 1111 1111 1112 x"),
        ("server 8.8.8.8 and 2001:4860:4860::8888", "server [IP] and [IP]"),
        ("localhost 127.0.0.1, 192.168.0.1, version 1.2.3.4.5", "localhost 127.0.0.1, 192.168.0.1, version 1.2.3.4.5"),
        ("at 12:30:45 sharp", "at 12:30:45 sharp"),
        ("key sk-abcdefghijklmnopqrstuvwxyz1234 here", "key [KEY] here"),
        ("AKIAIOSFODNN7EXAMPLE", "[KEY]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----!", "[KEY]!"),
        ("task-abcdefghijklmnopqrstuvwxyz", "task-abcdefghijklmnopqrstuvwxyz"),
        ("class sk-toggleable__label-arrow", "class sk-toggleable__label-arrow"),
        ("by UnionPay 6212345678900000003 I paid", "by UnionPay [CARD] I paid"),
        ("Il est au 01 42 68 53 00 demain", "Il est au [PHONE] demain"),
        ("Büro: 030/901820, (089) 2345678", "Büro: [PHONE], [PHONE]"),
        ("dial 0044 20 7031 3000 or +4915112345678", "dial [PHONE] or [PHONE]"),
        ("my mobile is 612345678", "my mobile is [PHONE]"),
        ("3.15.90.221 via tun0, 2001:db9::1 too", "[IP] via tun0, [IP] too"),
        ("(+33 1 42 68 53 00) is ours", "([PHONE]) is ours"),
    ],
)
def test_personal_data(before: str, after: str) -> None:
    """Catches: personal data that stays, and numbers, times, versions and words that are taken for it."""
    assert replace_personal_data(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "612345678", "9508735610", "6212345678900000003", "the product is 6503253000 exactly", "821091117+4908374100427",
        "98172488 + 98172488 = 196344976", "650-253-0000 = x", "uint32_t h = 2166136261u; /* 32 bits */",
        "call `dial(+4915112345678)` or\n```\nphone 650-253-0000 at 93.184.216.34\n```", "x = np.arange(6) + 98172488",
        "See section 2.3.1.1 and table 10.4.2.7.", "Chrome/120.0.6099.71", "upgrade V8 from 4.5.103.24 to 4.5.103.35",
        "RFC 7540 8.1.2.4 says", "std::vector and dead::beef and [1::2]", "ISSN 0377-0427", "ISBN 978-3-16-148410-0",
        "Adv. Comp. 5 (1996) 329-359", "Boston, MA 02110-1301", "0391 0301;;;;N;GREEK", "2023-01-15 or 15.01.2023 10",
        "1FB7; 0391 0342 0345; # GREEK", "ABOVE AND GRAVE;0069 0307 0300", "Patent Application WO 01/94611", "at +36.87462906",
        "802.11-2016 9.4.2.159", "in 1.3.101.112", "DNS-Based discovery (6.3.6.1)", "June 2000::", 'graft "2085::2093"',
        "(being in 2002::/16)",
        "a million: 1 234 567 890", "pi is 3.14159265358979", "md5 9e107d9d372bb6826bd81d3542a419d6",
    ],
)  # fmt: skip
def test_numbers_that_are_nobodys(text: str) -> None:
    """Catches: code, sums, versions, sections, dates, postcodes and whole numeric answers that are taken for personal data."""
    assert replace_personal_data(text) == text


def test_the_card_shows_each_kind_by_its_form(build_data: Build) -> None:
    """Catches: a reader of the card who cannot see what was replaced, or who sees the number itself."""
    dirty = {
        "prompt": "Who sold the old violin?",
        "completion": "Jane: jane@example.org or +49 30 901820, at 8.8.8.8 too.",
    }
    built = build_data(rows(dirty), validation_share=0.3, stages="shared")
    assert built.card["steps"]["personal"]["examples"] == [
        "rows.jsonl, row 41: ne: [EMAIL] or +## ## ###### -> [PHONE]",
        "rows.jsonl, row 41: Jane: ####@#######.### -> [EMAIL]",
    ]


@pytest.mark.parametrize(
    "said", ["<|im_start|>user", "[INST] a [/INST]", "a\n\nHuman: b", "### Response: x", "<start_of_turn>", "</s>"]
)
def test_template_marks_are_refused(said: str) -> None:
    """Catches: data that went through a chat template once and would go through it twice."""
    prompt = [{"role": "user", "content": "a question"}]
    for record in (Record(prompt=[{"role": "user", "content": said}]), Record(prompt=prompt, responses=[said])):
        with pytest.raises(Dropped, match="holds the mark"):
            check_template(record)
    harmless = "A human: see a<s>b and a | b; assistants: two"
    check_template(Record(prompt=prompt, responses=[harmless]))


@pytest.mark.parametrize(
    ("said", "content"),
    [("Yes", True), ("好", True), ("42", True), ("👍", True), ("Assistant:", False), (" - ... ", False),
     ("TL;DR:", False), ("<noinput>", False), ("N/A", False), ("The answer: 4", True), ("Human nature", True)],
)  # fmt: skip
def test_empty_or_template_only(said: str, content: bool) -> None:
    """Catches: answers that say nothing, and short answers that say something."""
    assert has_content(said) == content


def rows(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [*({"prompt": text(2 * i), "completion": text(2 * i + 1)} for i in range(40)), *more]


def test_steps_are_counted_and_can_be_switched_off(build_data: Build) -> None:
    """Catches: a change that nobody is told of, a step that runs although it was left out, and personal data on the card."""
    dirty = [
        {"prompt": "Where is the cafÃ© of the old town?", "completion": "Behind the station, I believe."},
        {
            "prompt": "How can I reach Jane, who sold the violin?",
            "completion": "Write to jane@example.org, she answers.",
        },
        {"prompt": "What is left of the candle and the paper?", "completion": "..."},
        {"prompt": "Can you show the marks of the template?", "completion": "<|im_start|>assistant\nyes"},
    ]
    built = build_data(rows(*dirty), validation_share=0.3, stages="shared")
    steps = built.card["steps"]
    assert (steps["encoding"]["changed"], steps["personal"]["changed"]) == (1, 1)
    assert steps["encoding"]["examples"] == [
        "rows.jsonl, row 41: 'here is the cafÃ© of the old town?' -> 'here is the café of the old town?'"
    ]
    assert built.reasons("clean") == {
        "empty or template-only answer": 1,
        "holds the mark '<|im_start|>' of a template": 1,
    }
    assert "Where is the café of the old town?" in built.prompts("demonstrations")
    assert "jane@" not in (built.folder / "card.json").read_text() + (built.folder / "card.md").read_text()
    off = build_data(rows(*dirty), folder="off", validation_share=0.3, stages="shared", clean=[])
    assert "Where is the cafÃ© of the old town?" in off.prompts("demonstrations") and off.rejected == []


def test_html_width_and_order(build_data: Build) -> None:
    """Catches: steps that run in the order in which they were listed: tags would survive that entities hide."""
    dirty = {"prompt": "<p>ＷＨＹ is the river so wide today?</p>", "completion": "Rain &amp; snow, I suppose."}
    built = build_data(rows(dirty), validation_share=0.3, stages="shared", clean=["width", "html", "encoding"])
    assert "\nWHY is the river so wide today?\n" in built.prompts("demonstrations")
    assert list(CLEANING_STEPS).index("html") < list(CLEANING_STEPS).index("width")


def test_of_a_ranking_only_the_empty_response_goes(build_data: Build) -> None:
    """Catches: a ranking of four lost for one empty answer; or ratings that no longer fit the responses."""
    ranking = {
        "prompt": "Which of the four is best?",
        "responses": ["first of all", "...", "second best", "third"],
        "ratings": [4, 3, 2, 1],
    }
    pairs = [
        {"prompt": text(i), "responses": [text(-i), "no " + text(-i - 99)], "ratings": [1, 0]} for i in range(1, 40)
    ]
    built = build_data([ranking, *pairs], validation_share=0.3, stages="shared")
    (row,) = (r for r in built.rows("comparisons") if r["prompt"][0]["content"] == ranking["prompt"])
    assert [r[0]["content"] for r in row["responses"]] == ["first of all", "second best", "third"]
    assert row["ratings"] == [4, 2, 1] and row["ranks"] == [1, 2, 3]


def test_language_filter(build_data: Build) -> None:
    """Catches: a filter that keeps other languages, or takes out short answers that could be any."""
    english = [
        {"prompt": f"Please tell me the story of number {i} and {text(i)}", "completion": "It was a long winter."}
        for i in range(40)
    ]
    others = [
        {
            "prompt": "Bitte erzähle mir eine Geschichte über den langen Winter",
            "completion": "Es war einmal ein kalter Winter.",
        },
        {"prompt": "请给我讲一个关于冬天的故事", "completion": "从前有一个寒冷的冬天。"},
        {"prompt": "2 + 2 = ?", "completion": "4"},
    ]
    kept = build_data([*english, *others], validation_share=0.3, stages="shared", languages=["en", "zh"])
    assert kept.reasons("clean") == {"language de": 1}
    only = build_data([*english, *others], folder="en", validation_share=0.3, stages="shared", languages=["en"])
    assert only.reasons("clean") == {"language de": 1, "language zh": 1}
