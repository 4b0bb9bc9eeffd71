"""Every error Hansa raises on purpose, in one tree.

    HansaError
    ├── ContractError     a contract file, or a value in it, cannot be used
    ├── PolicyError       a merchant's own file (merchant.toml) cannot be used
    ├── DataError         a customer table, or a built-in data set, cannot be used
    ├── SettingsError     the operator's own file (server.toml) cannot be used
    ├── IdentityError     a key, or the list of enrolled members, cannot be used
    │   └── EnrolmentError a token, a signed list or a member's request is refused
    ├── WireError         a message is not what the protocol says
    │   └── SecureSumError a message breaks a rule that keeps single vectors hidden
    ├── LedgerError       the ledger cannot be read or written
    │   ├── BudgetRefusal a charge would pass the merchant's cap
    │   ├── ReplayRefusal a release was asked for a second time
    │   └── WitnessRefusal the witness did not see, or saw more than, what the ledger holds
    ├── AccountingError   an epsilon or a noise multiplier cannot be given safely
    ├── RunError          a federated run cannot start or go on
    │   ├── ArchiveError  the coordinator cannot keep what it has to keep
    │   ├── SuperLinkError Flower's SuperLink does not answer, or refuses
    │   ├── UnreachableError the operator does not answer, or is not who was pinned
    │   └── NotReady      a service was started and runs, but is not ready yet
    ├── ServiceError      a process that should run for long cannot start, or is missing
    ├── BundleError       a published bundle is incomplete or was changed
    └── EvidenceError     evidence for an audit is incomplete, unsafe to read, or was changed

Messages name what was wrong, where, and what to do. They never hold a value of a
customer's row: the text of an exception may travel to the server.
"""


class HansaError(Exception):
    """Report something a person can put right."""


class ContractError(HansaError):
    """A contract file, or a value in it, cannot be used."""


class PolicyError(HansaError):
    """A merchant's own file cannot be used."""


class DataError(HansaError):
    """A customer table or a built-in data set cannot be used."""


class SettingsError(HansaError):
    """The operator's own file cannot be used."""


class WireError(HansaError):
    """A message is not what the protocol says."""


class IdentityError(HansaError):
    """A key, or the list of enrolled members, cannot be used."""


class EnrolmentError(IdentityError):
    """A token, a signed list of members or a member's request is refused."""


class SecureSumError(WireError):
    """A message breaks a rule that keeps single vectors hidden; nothing was sent for it."""


class LedgerError(HansaError):
    """The ledger cannot be read or written."""


class BudgetRefusal(LedgerError):
    """A charge would pass the merchant's cap."""


class ReplayRefusal(LedgerError):
    """A release was asked for a second time."""


class WitnessRefusal(LedgerError):
    """The witness did not see, or saw more than, what the ledger holds."""


class AccountingError(HansaError):
    """An epsilon or a noise multiplier cannot be given safely."""


class RunError(HansaError):
    """A federated run cannot start or go on."""


class ArchiveError(RunError):
    """The coordinator cannot keep what it has to keep: heads of ledgers, the record of a run."""


class SuperLinkError(RunError):
    """Flower's SuperLink does not answer, or refuses what was asked of it."""


class UnreachableError(RunError):
    """The operator does not answer, or is not the one that was pinned."""


class NotReady(RunError):
    """A service was started and runs, but is not ready yet; it goes on trying."""


class BundleError(HansaError):
    """A published bundle is incomplete or was changed."""


class EvidenceError(HansaError):
    """Evidence for an audit is incomplete, unsafe to read, or was changed."""


class ServiceError(HansaError):
    """A process that should run for long cannot start, or is missing."""
