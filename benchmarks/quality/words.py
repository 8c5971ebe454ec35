"""Words for facts, and the sentences of needles."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = listed(
    "Lisbon Nairobi Oslo Lima Hanoi Prague Dublin Cairo Quito Seoul Vienna Athens Manila Havana "
    "Zagreb Bogota Tunis Riga Perth Osaka Delhi Turin Accra Boston Geneva Munich Porto Madrid "
    "Warsaw Sydney Berlin Tokyo"
)
NAMES = listed(
    "Oliver Amara Henrik Sofia Rajesh Ingrid Tobias Yuki Marcel Fatima Dmitri Rosa Stefan Leila "
    "Patrick Hannah Gustav Priya Walter Nadia Felix Greta Samuel Bianca Victor Elena Martin Chloe "
    "Hassan Olga Julian Teresa"
)
FRUITS = listed(
    "mango cherry banana papaya lemon peach plum grape apricot melon lime orange kiwi coconut "
    "strawberry raspberry pear fig pineapple tangerine blackberry apple"
)
WORDS = listed(
    "copper lantern velvet harbor thunder willow marble falcon ginger meadow silver anchor "
    "crystal pepper walnut hammer candle winter saddle bronze forest tunnel basket garden "
    "rocket mirror pillow cotton dragon island"
)
NOUNS = listed(
    "tide signal orbit ledger voltage cargo harvest beacon turbine glacier pollen circuit"
)
TRADES = listed("clockmaker baker printer weaver potter tailor brewer glazier saddler carpenter")
ADJECTIVES = listed(
    "amber ancient bitter blue bold brave bright broad calm careful clever cold crimson curious "
    "dark deep distant dusty eager early empty faint famous fierce final frozen gentle golden "
    "grand green heavy hidden hollow honest humble idle jolly keen late lively lonely loud loyal "
    "mellow modern narrow noble odd old pale patient plain proud quick quiet rapid rare rough "
    "royal rusty scarlet secret sharp shiny short silent simple slow small smooth solemn spare "
    "steady steep strange sturdy sudden swift tall tame tender thin tidy tiny vast warm weary "
    "wide wild wise"
)
VERBS = listed("compute estimate resolve merge encode balance restore filter predict calibrate")
STYLES = ("mixed", "code", "mixed", "passphrase")  # styles of needles, round by round
SENTENCES = (  # (beginning of a needle, kind of its answer)
    ("The secret access code for {city} is", "number"),
    ("The serial number of the {word} is", "number"),
    ("The phone number of {name} is", "number"),
    ("The passphrase of {name} is", "words"),
    ("The password for the {word} account is", "words"),
    ("The favourite fruit of {name} is", "fruit"),
    ("The hotel room booked in {city} has the number", "number"),
    ("The winning lottery ticket was", "number"),
    ("The spy will meet {name} at the station in", "city"),
    ("The password of the wireless network is", "words"),
    ("The parcel for {name} has the tracking number", "number"),
    ("The cake for the birthday of {name} is made with", "fruit"),
)
