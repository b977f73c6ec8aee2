"""Personal data in texts, replaced by the marks `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IP]` and `[KEY]`, by form and checksum.

A run of digits is none of these: a number needs the form of one (country code, groups, brackets) or a word that says so, and
source code, sums, versions, dates and whole numeric answers stay. Names and addresses are not found: that needs a model, and
is not attempted here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, Leniency, PhoneNumberMatcher

#: Countries, ISO 3166, whose national forms are known; international forms are known of all.
PHONE_REGIONS = (
    "US", "CN", "GB", "DE", "FR", "IT", "ES", "NL", "BE", "CH", "AT", "PL", "SE", "JP", "KR", "IN", "BR", "MX", "AU", "RU",
)  # fmt: skip
#: Code in Markdown: between fences, or between backticks.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b")
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|glpat-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})",
    re.DOTALL,
)
_CARD = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,18}+(?![\w.]?\d|\w)")
_ISSUER = re.compile(
    r"(?:4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3[068]\d{12}"
    r"|(?:6011|65\d\d|35\d\d)\d{12}|62\d{14,17})"
)
_CARD_GROUPS = re.compile(r"\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5}")
_CARD_WORD = re.compile(r"card|credit|debit|visa|amex|american express|unionpay|discover|卡", re.IGNORECASE)

_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d|-\w)")
_UNICAST = ipaddress.ip_network("2000::/3")
_IP_WORD = re.compile(
    r"\b(?:ips?|ipv4|address(?:es)?|hosts?|servers?|dns|ping|ssh|client|gateway|proxy|nameserver|https?)\b(?!-)|地址|服务器",
    re.IGNORECASE,
)
_SECTION = re.compile(
    r"(?:\b(?:sections?|versions?|tables?|chapters?|figures?|releases?|appendix|build|driver|firmware|oid|rfc|since|until"
    r"|python|v|ver|sec|fig|tab|no|nr)\b|[§~^<>=]|\w/|第|版本|章节|表)\W{0,3}$|\brfc ?\d+\W{0,3}$"
    r"|\b(?:up(?:date|grade)|downgrade|patch|bump)\w*\b[^\n]*$",
    re.IGNORECASE,
)

#: Digits with what stands between groups of a phone number; `{6,14}+` gives no digit back.
_NUMBER = re.compile(
    r"(?<![\w.,:/^$€£¥#%@*\\-])\+?(?:\((?=\+?\d{1,5}\)))?\+?\d(?:(?:\)? ?[-./‐-–] ?|\)[ \xa0]?\(?|[ \xa0]\(?|\()?\d){6,14}+"
    r"(?![\w%€$£°]|[-.,:/)\xa0 ]{0,2}\d)",
    re.ASCII,
)
_PHONE_WORD = re.compile(
    r"(?:\b(?:tel[ée]?(?:ph?one?|f[oó]no|fone?|foon|fax)?n?(?:nummer|number)?|phones?|calls?|called|calling|dial|rings?|mobile|cell"
    r"|cellphone|fax|sms|whats\s?app|hotline|helpline|contact|reach|handy|mobil|rufnummer|m[oó]vil|celular|cellulare|portable"
    r"|gsm|landline|телефон\w*|тел|звоните)\b|电话|電話|手机|手機|联系|致电|拨打|携帯|전화|휴대폰)[^\d\n]{0,30}$",
    re.IGNORECASE,
)
#: National forms that begin with no 0, by the lengths of their groups.
_GROUPS = re.compile(
    r"\d{3}([-. ])\d{3}\1\d{4}|1\d\d([- ])\d{4}\2\d{4}|[5-9]\d\d-\d{3}-\d{3}|[6-9]\d\d(?: \d\d){3}|\d\d \d{3} \d\d \d\d"
    r"|3\d\d[- ]\d{7}|[6-9]\d{4} \d{5}|\d\d([- ])\d{4}\3\d{4}|\d\d 9\d{4}-\d{4}|8[ -]\d{3}[ -]\d{3}[ -]\d\d[ -]\d\d"
)
_DATE = re.compile(
    r"(?:(?:1[5-9]|20)\d\d[-./ ]\d{1,2}[-./ ]\d{1,2}(?!\d)|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d\d(?!\d))|97[89][- ]"
)
_SOURCE = re.compile(
    r"^\s*(?:def |class |import |from \S+ import|return\b|#include|#define|//|/\*|>>>|\$ |var |let |const |assert |0x)"
    r"|==|!=|\+=|=>|->|:=|[g-z_]\w*::|::[g-z_]|&&|\|\||\b[A-Za-z_]\w*(?:\[\w*\])? ?= ?[\w\"'(\[+-]|[=\"'{}].*;\s*$|\w\(\)"
    r"|[a-z_]{2,}\((?:[\"']|[A-Za-z_]{2,}[,=.(\[])"
)
_SUM_BEFORE, _SUM_AFTER = re.compile(r"[\d)]\s*[+*/×÷=-]\s*$|[=×÷^<>≈*]\s*$"), re.compile(r"\s*[+*/×÷=^<>≈]|\s-\s*\d")


@dataclass(frozen=True)
class Replacement:
    """A piece of personal data that was replaced."""

    mark: str
    original: str
    before: str
    """What stood before it."""

    def __str__(self) -> str:
        """Return its form, in # for letters and digits, and its mark."""
        before, original = re.sub(r"\d", "#", self.before), re.sub(r"[^\W_]", "#", self.original[:40])
        return f"{before}{original} -> {self.mark}"


def replace_personal_data(text: str, phone_regions: tuple[str, ...] = PHONE_REGIONS) -> str:
    """Return the text with e-mail addresses, keys, card numbers, public IP addresses and phone numbers replaced.

    Args:
        phone_regions: countries, ISO 3166, whose national forms are phone numbers; international forms (`+49 ...`) always are.
    """
    return replacements(text, phone_regions)[0]


def replacements(text: str, phone_regions: tuple[str, ...] = PHONE_REGIONS) -> tuple[str, list[Replacement]]:
    """Return the text after `replace_personal_data`, and what was replaced."""
    replaced: list[Replacement] = []

    def sub(pattern: re.Pattern[str], mark: str, is_one: Callable[[re.Match[str]], bool] = lambda _: True) -> str:
        def change(match: re.Match[str]) -> str:
            if not is_one(match):
                return match[0]
            replaced.append(Replacement(mark, match[0], _before(match, 15)))
            return mark

        return pattern.sub(change, text)

    if "@" in text:
        text = sub(_EMAIL, "[EMAIL]")
    text = sub(_KEYS, "[KEY]")
    if any(character.isdigit() for character in text):
        text = sub(_CARD, "[CARD]", lambda match: _is_card(match) and not _in_code(match))
        text = sub(_IP, "[IP]", lambda match: _is_public(match) and not _in_code(match))
        text = sub(_NUMBER, "[PHONE]", lambda match: _is_phone(match, phone_regions) and not _in_code(match))
    return text, replaced


def _before(match: re.Match[str], characters: int = 40) -> str:
    """Return what stands before a number, on its line."""
    return match.string[max(0, match.start() - characters) : match.start()].rpartition("\n")[2]


def _in_code(match: re.Match[str]) -> bool:
    """Return True for a number between backticks or on a line that reads as source code."""
    text = match.string
    if "`" in text and any(code.start() <= match.start() < code.end() for code in CODE.finditer(text)):
        return True
    start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
    last = min(len(text) if end < 0 else end, match.end() + 200)
    return _SOURCE.search(text[max(start, match.start() - 200) : last]) is not None


def _is_card(match: re.Match[str]) -> bool:
    """Return True for a number of an issuer's range that passes Luhn's check and is grouped, or named, as a card's."""
    digits = re.sub(r"\D", "", match[0])
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(map(int, reversed(digits)))]
    if sum(doubled) % 10 or not _ISSUER.fullmatch(digits):
        return False
    return _CARD_GROUPS.fullmatch(match[0]) is not None or _CARD_WORD.search(_before(match)) is not None


def _is_public(match: re.Match[str]) -> bool:
    """Return True for an address of one machine in the internet; 127.0.0.1, 192.168.0.1 and section 2.3.1.1 are no such."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast:
        return False
    if address.version == 6:  # d::e and 1::2 stand in programs, 2000:: and 2085::2093 in texts and in names of networks
        return address in _UNICAST and len(re.findall(r"[0-9A-Fa-f]+", match[0])) > 2
    before = _before(match)
    if re.search(r"://$", before):
        return True
    if _SECTION.search(before):
        return False
    # sections of standards and object identifiers begin with two low numbers: 9.4.2.159, 1.3.101.112
    machine = max(address.packed) >= 100 and max(address.packed[:2]) >= 10
    return machine or _IP_WORD.search(before) is not None


def _is_phone(match: re.Match[str], regions: tuple[str, ...]) -> bool:
    """Return True for a number in the written form of a phone number, or one after a word for phone."""
    number, text = match[0], match.string
    digits = re.sub(r"\D", "", number)
    before, after = _before(match), text[match.end() : match.end() + 4]
    named = _PHONE_WORD.search(before) is not None
    if not named and (_SUM_BEFORE.search(before) or _SUM_AFTER.match(after) or _SECTION.search(before)):
        return False
    if number.lstrip("( ").startswith("+"):
        if re.fullmatch(r"\+\d+\.\d+", number) and not named:
            return False  # a coordinate
        return _matches(number, [None], Leniency.VALID)
    if len(digits) == len(number) and not named:
        return False  # a bare run of digits
    code = re.match(r"\(?00(\d{1,3})\D", number)
    if code and int(code[1]) not in COUNTRY_CODE_TO_REGION_CODE:
        return False  # 0069 0307 0300 are code points
    if digits.startswith("00") and _matches("+" + number.lstrip("(")[2:], [None], Leniency.VALID):
        return True
    if _DATE.match(number) or (len(digits) < 8 and not named):
        return False
    return (named or _has_phone_groups(number)) and _matches(
        number, regions, Leniency.VALID if named else Leniency.STRICT_GROUPING
    )


def _has_phone_groups(number: str) -> bool:
    """Return True for groups of digits that are neither thousands, nor years, nor a postcode, nor a version."""
    if "(" in number:
        return re.match(r"(?:[08] ?)?\((?:0\d{1,4}|\d{2,3})\)", number) is not None
    if number.startswith("0"):
        return re.match(r"0\d{1,4}\D", number) is not None and not re.fullmatch(
            r"\d{4,5}[- ]\d{4}|0\d+ 0\d+ 0\d+", number
        )
    return _GROUPS.fullmatch(number) is not None


def _matches(number: str, regions: Sequence[str | None], leniency: int) -> bool:
    """Return True for a number that is one as a whole in one of the regions' numbering plans."""
    for region in regions:
        match = next(iter(PhoneNumberMatcher(number, region, leniency=leniency)), None)
        if match is not None and match.start <= 1 and match.end == len(number):
            return True
    return False
