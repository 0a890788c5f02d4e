"""How long the rest of a run will take, said before it begins."""

from dataclasses import dataclass

from gpt.config import TrainConfig

LONG = 0.2  # the share of evaluations in a run from which on they are worth a word
WORTH_SAYING = 120.0  # seconds


@dataclass(frozen=True)
class Forecast:
    """Steps and evaluations that are left, and the seconds that one of each takes, about."""

    steps: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    def described(self, config: TrainConfig) -> str:
        """A line for people, with what would shorten the run if evaluations are much of it."""
        of_evaluations = self.evaluations * self.evaluation_seconds
        line = f"about {duration(self.seconds)}: {self.steps:,} steps of {duration(self.step_seconds)}"
        line += f", {self.evaluations} evaluations of {duration(self.evaluation_seconds)}"
        if self.seconds > WORTH_SAYING and of_evaluations > LONG * self.seconds:
            fewer = max(1, config.eval_iters // 10)
            saved = duration(of_evaluations * (1 - fewer / config.eval_iters))
            line += f"; --eval-iters {fewer} instead of {config.eval_iters} would save {saved}"
        return line


def forecast(config: TrainConfig, step: int, evaluated_step: int, seconds: tuple[float, float]) -> Forecast:
    """Of a run that is at `step` and was evaluated last at `evaluated_step`; seconds: of a step and an evaluation."""
    last, interval = max(step, config.max_iters), config.eval_interval
    evaluated = {last, *range(-(-step // interval) * interval, last + 1, interval)} - {evaluated_step}
    return Forecast(last - step, seconds[0], len(evaluated), seconds[1])


def duration(seconds: float) -> str:
    """A time in the unit that suits it: 6.2 ms, 13 s, 4.5 min, 12 h, 3.1 days."""
    units = (
        ("days", 86400.0, 172800.0),
        ("h", 3600.0, 5400.0),
        ("min", 60.0, 90.0),
        ("s", 1.0, 1.0),
        ("ms", 1e-3, 0.0),
    )
    unit, length = next((unit, length) for unit, length, least in units if seconds >= least)
    return f"{seconds / length:.{1 if seconds < 9.95 * length else 0}f} {unit}"
