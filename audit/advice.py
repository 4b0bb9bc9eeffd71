"""What to do about a finding, by its code. What each means stands in docs/auditors.md."""

from audit.findings import Finding

_STOP = "Stop all runs of this merchant. "
_RECEIVED = "Ask the party to make its evidence anew, and audit again. "
_LEDGER = (
    "Take this ledger for changed. Hold it against the heads that the witness countersigned, and "
    "rely on nothing in it until both agree. "
)
_RECORD = "Do not rely on this run until the coordinator explains it. "
_BUNDLE = "Do not use what this run published until the coordinator explains it. "
_TWO_SIDES = "Compare both records entry by entry: one of the two parties tells it wrongly. "
_CODE = (
    "Stop using this version: it does not do what the ledger charges. Repeat "
    "`hansa audit empirical` with another seed, and tell the developers. "
)

ADVICE = {
    "evidence-invalid": _RECEIVED,
    "evidence-incomplete": _RECEIVED,
    "not-enrolled": "Ask the party, by another way, for its public key; rely on nothing it signed.",
    "members-differ": "Compare the lists of members at all parties: whoever adds keys can collude.",
    "contract-differs": "Compare the contract's hash at all parties; another contract promises "
    "something else.",
    "ledger-unreadable": _RECEIVED,
    "chain-gap": _LEDGER,
    "chain-broken": _LEDGER,
    "entry-signature": _LEDGER + "Ask the merchant whether its key was lost.",
    "entry-schema": _LEDGER,
    "ledger-foreign": "This ledger is of another merchant. " + _RECEIVED,
    "rekey-invalid": _LEDGER + "Somebody may have taken up a ledger that is not its own.",
    "rekey-missing": _LEDGER + "A new ledger forgets what was spent under the key before.",
    "key-given-up": _STOP + "Whoever has the old key signed with it: it may be stolen. Make new "
    "keys, and believe nothing that it signed after the rotation.",
    "open-rule": _LEDGER,
    "reserve-twice": _LEDGER,
    "entry-without-reserve": _LEDGER,
    "release-without-reserve": _STOP + "Something left that nobody had paid for.",
    "release-after-close": _STOP + "Something left after the run was closed, and was not charged.",
    "release-twice": _STOP + "One question was answered twice; the second answer was not charged.",
    "step-twice": _STOP + "Two vectors may have been masked alike: their difference is open.",
    "step-not-joined": _STOP + "It took part in a sum of a session that it never joined, or "
    "without a mask.",
    "release-not-covered": _STOP + "More left than was reserved. Count the releases, not the "
    "reservation.",
    "release-not-planned": _STOP + "Something left that the contract does not plan.",
    "contract-switched": _STOP + "One run was charged under two contracts.",
    "sum-without-release": _LEDGER,
    "close-twice": _LEDGER,
    "expired-early": _STOP + "It forgot what was spent before its own policy allowed that.",
    "cap-exceeded": _STOP + "Whoever owns its policy decides whether what was spent is acceptable; "
    "record that in the impact assessment, and find out how the cap was passed.",
    "epsilon-differs": "Believe the larger figure, correct what was told, and find out which "
    "accountant is wrong.",
    "countersignature-invalid": "Ask coordinator and merchant for their countersignatures; one of "
    "them was changed.",
    "not-witnessed": _STOP + "It released before the witness had seen its charge.",
    "truncated": _STOP + "The witness saw later entries than the ledger has: charges are missing.",
    "forked": _STOP + "Two ledgers were kept under one key: add up the charges of both.",
    "rolled-back": _STOP + "An older copy was put back: charges in between were forgotten.",
    "anchor-missing": _STOP + "A head that was noted earlier is not in this ledger any more.",
    "record-schema": _RECEIVED,
    "record-rewritten": _RECORD,
    "start-differs": _RECORD + "Whoever chose other parameters to start from may have trained them "
    "on customers.",
    "session-differs": _RECORD,
    "advert-invalid": _RECORD + "Somebody may have stood in for a merchant.",
    "below-threshold": _RECORD + "A sum over too few merchants hides each of them less.",
    "sum-differs": _RECORD,
    "sum-repeated": _RECORD + "Two sums over almost the same merchants tell one of them.",
    "replay-differs": _BUNDLE + "Something else than the recorded sums entered the model.",
    "bundle-invalid": _BUNDLE,
    "bundle-differs": _BUNDLE,
    "privacy-differs": _BUNDLE + "Believe the recomputed figures.",
    "published-differs": _BUNDLE + "A published figure does not come from the noisy sums.",
    "release-without-event": _TWO_SIDES + "Either the merchant released without a charge, or the "
    "coordinator made it up.",
    "release-differs": _TWO_SIDES,
    "survivors-overstated": _TWO_SIDES + "Count on the smaller number of noise shares.",
    "unknown-to-server": _TWO_SIDES + "The merchant released more than the coordinator tells.",
    "advert-head-unknown": _TWO_SIDES + "The ledger may have been exchanged during the run.",
    "code-differs": "Find out which code each party runs, and whether that version was reviewed.",
    "unit-differs": "The ledger protects something else than customers: read what, and say so.",
    "refresh-period": "Read the lifetime epsilon: a customer who stays is in every period.",
    "witness-clock": "Set the witness's clock; times in this report are less sure.",
    "witness-log-short": "Ask the coordinator for the whole log of its witness.",
    "run-unknown-to-server": "Ask the coordinator for its record of this run, or the merchant who "
    "asked for it.",
    "record-ends-early": "Ask the coordinator whether the run was broken off; what was asked "
    "for is spent all the same.",
    "survivors-understated": "Nothing is lost: there was more noise than is told. Ask why.",
    "evidence-older": "Ask for evidence that was made after the run's end.",
    "contract-missing": "Ask the party for the contract with this hash.",
    "bundle-missing": "Ask the coordinator for the published bundle.",
    "noise-seeded": "Do not publish what this run gave; repeat it without a seed.",
    "closed-form-differs": "Quote the larger figure, and find out which of the two is wrong.",
    "mechanism-test-failed": _CODE,
    "empirical-bound-above-claim": _CODE + "What was released is less private than claimed.",
    "empirical-failed": _CODE,
}
_OTHERWISE = {
    "fail": "Do not rely on the guarantee until this is explained.",
    "warning": "Ask the party that it concerns for an explanation, and file the answer.",
    "note": "Nothing to do; good to know when reading on.",
}


def advice_on(finding: Finding) -> str:
    """Return what to do about a finding."""
    found = ADVICE.get(finding.code) or _OTHERWISE.get(finding.severity, _OTHERWISE["warning"])
    return found.strip()
