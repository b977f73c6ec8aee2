"""Personal data in texts, replaced by the marks `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IP]` and `[KEY]`, by pattern and checksum.

Names and addresses are not found: that needs a model, and is not attempted here.
"""

from __future__ import annotations

import ipaddress
import re

from phonenumbers import Leniency, PhoneNumberMatcher

_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b")
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|glpat-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})",
    re.DOTALL,
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]?\d)")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
_DIGITS = re.compile(r"[+(]?\d[\d\s().-]{5,}\d")


def replace_personal_data(text: str, phone_regions: tuple[str, ...] = ("US", "CN")) -> str:
    """Return the text with e-mail addresses, keys, card numbers, public IP addresses and phone numbers replaced.

    Args:
        phone_regions: countries, ISO 3166, whose national forms are phone numbers; international forms (`+49 ...`) always are.
    """
    if "@" in text:
        text = _EMAIL.sub("[EMAIL]", text)
    text = _KEYS.sub("[KEY]", text)
    if not any(character.isdigit() for character in text):
        return text
    text = _CARD.sub(lambda match: "[CARD]" if _is_card(match[0]) else match[0], text)
    text = _IP.sub(lambda match: "[IP]" if _is_public(match[0]) else match[0], text)
    if _DIGITS.search(text):
        for region in phone_regions:
            text = _without_phones(text, region)
    return text


def _is_card(text: str) -> bool:
    """Return True for a number that begins like a payment card's and passes Luhn's check."""
    digits = [int(character) for character in text if character.isdigit()]
    if digits[0] not in (2, 3, 4, 5, 6):
        return False
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_public(text: str) -> bool:
    """Return True for an address of one machine in the internet; 127.0.0.1 and 192.168.0.1 are no such."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _without_phones(text: str, region: str) -> str:
    # STRICT_GROUPING: digits must stand in groups as people of that region write them, or in one block
    matches = list(PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING))
    for match in reversed(matches):
        text = text[: match.start] + "[PHONE]" + text[match.end :]
    return text
