"""Our accounting as an accountant of Opacus, so that Opacus' own tools can use it."""

from common.accounting import epsilon, quick_epsilon
from common.events import Event, PoissonGaussianSum
from common.opacus_import import opacus_accountants

MECHANISM, QUICK = "hansa", "hansa-quick"


class HansaAccountant:
    """Keep a history of Poisson-sampled steps and compose it with `common.accounting`.

    Has what Opacus' `IAccountant` asks for, but for the hook of an optimizer.
    """

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []  # (noise multiplier, rate, count)

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step."""
        self.history.append((noise_multiplier, sample_rate, 1))

    def get_epsilon(self, delta: float, *, others: tuple[Event, ...] = ()) -> float:
        """Return epsilon of the history together with `others`."""
        return epsilon((*self._steps(), *others), delta)

    def _steps(self) -> list[Event]:
        return [
            PoissonGaussianSum(sigma, 1.0, rate, int(count)) for sigma, rate, count in self.history
        ]

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return sum(int(count) for _, _, count in self.history)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which Opacus knows this accountant."""
        return MECHANISM


class QuickAccountant(HansaAccountant):
    """The same for a search that asks many times."""

    def get_epsilon(self, delta: float, *, others: tuple[Event, ...] = ()) -> float:
        """Return `quick_epsilon` of the history together with `others`."""
        return quick_epsilon((*self._steps(), *others), delta)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which Opacus knows this accountant."""
        return QUICK


for _name, _accountant in ((MECHANISM, HansaAccountant), (QUICK, QuickAccountant)):
    opacus_accountants().register_accountant(_name, _accountant, force=True)
