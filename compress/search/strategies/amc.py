"""Ratios chosen group after group by a reinforcement-learning agent.

He et al., AMC: AutoML for Model Compression and Acceleration on Mobile Devices, ECCV 2018, arXiv:1802.03494. Needs
requirements-search.txt; nothing else imports stable_baselines3 or gymnasium.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import gymnasium
import numpy as np
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.logger import Logger

from compress.search.candidate import Candidate
from compress.search.forecast import Forecast
from compress.search.outcome import Outcome
from compress.search.problem import History, Problem

LOUDEST, QUIETEST = 0.5, 0.05
"""Standard deviation of the noise on the agent's actions (-1..1): the paper's 0.5 at first, falling by one factor."""
WARM_UP = 0.25
"""Share of the trials with the loudest noise."""
BASELINE_DECAY = 0.95
"""Of the moving average of rewards, which is subtracted from each, as in the paper."""
POINTS_PER_REWARD = 10.0
GRADIENT_STEPS, BATCH, WIDTH = 50, 64, 64
"""After each episode; transitions in each step; neurons in each of two hidden layers of actor and critic."""
DRAWS = 20
"""Noise that leads to a candidate measured before is drawn again, at most this often."""


class Amc:
    """A DDPG agent walks through the groups; its action is the ratio of each, its reward the measured score.

    State of a group: its place, its channels, its number of choices, the share of all channels removed before it and left
    to decide behind it, and the ratio before it; each 0..1. Two things differ from the paper. Every step of an episode
    earns the episode's reward as there, but nothing of the next state's value (a discount of 0 in place of 1): sums of
    estimates need the paper's 400 episodes, and a search has some tens. And the paper bounds each action so that a budget
    of operations can still be met; here limits are measured milliseconds and bytes, so the actions of an episode are
    brought to the forecast together, and the agent learns from the ratios that were measured.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._start()

    def propose(self, history: History, left: int) -> Candidate:
        if list(history[: len(self._learned)]) != self._learned:
            self._start()
        for candidate, outcome in history[len(self._learned) :]:
            self._learn(candidate, outcome)
        forecast = Forecast.of(self.problem, history)
        if not history:
            return forecast.fitted({group.layers[0]: 0.0 for group in self.problem.space.groups})
        known = {one for one, _ in history}
        generator, noise = random.Random(f"{self.problem.seed} {len(history)}"), self._noise(len(history))
        for draw in range(DRAWS):
            candidate = forecast.fitted(self._episode(generator, noise * (1 + draw / 10)))
            if candidate not in known:
                break
        return candidate

    def _start(self) -> None:
        trials, groups = self.problem.trials, self.problem.space.groups
        with _seeded(f"{self.problem.seed} start"):
            self._agent = DDPG(
                "MlpPolicy",
                _Shapes(len(self._state(0, {}))),
                gamma=0.0,
                tau=0.01,
                buffer_size=max(1, trials) * len(groups),
                policy_kwargs={"net_arch": [WIDTH, WIDTH]},
                device="cpu",
            )
        self._agent.set_logger(Logger(None, []))
        self._learned: list[tuple[Candidate, Outcome]] = []
        self._baseline: float | None = None

    def _noise(self, episode: int) -> float:
        trials = self.problem.trials
        cooled = max(0.0, (episode / trials - WARM_UP) / (1 - WARM_UP))
        noise: float = LOUDEST * (QUIETEST / LOUDEST) ** min(1.0, cooled)
        return noise

    def _episode(self, generator: random.Random, noise: float) -> dict[str, float]:
        """Lead layer -> ratio, as the agent chooses them one after the other."""
        largest = self.problem.space.largest
        ratios: dict[str, float] = {}
        for place, group in enumerate(self.problem.space.groups):
            (action,), _ = self._agent.predict(self._state(place, ratios), deterministic=True)
            noisy = min(max(float(action) + generator.gauss(0, noise), -1.0), 1.0)
            ratios[group.layers[0]] = (noisy + 1) / 2 * largest
        return ratios

    def _state(self, place: int, ratios: Mapping[str, float]) -> np.ndarray:
        """float32 [6] of the group at `place`; after the last one, of an end where nothing is left to decide."""
        groups, space = self.problem.space.groups, self.problem.space
        total = sum(group.channels_before for group in groups)
        before = groups[:place]
        removed = sum(ratios[group.layers[0]] * group.channels_before for group in before)
        previous = ratios[before[-1].layers[0]] if before else 0.0
        here = groups[place : place + 1]
        channels = sum(group.channels_before for group in here) / max(group.channels_before for group in groups)
        choices = sum(len(space.choices(group)) for group in here) / max(len(space.choices(group)) for group in groups)
        rest = sum(group.channels_before for group in groups[place + 1 :])
        values = (place / len(groups), channels, choices, removed / total, rest / total, previous)
        return np.array(values, dtype=np.float32)

    def _learn(self, candidate: Candidate, outcome: Outcome) -> None:
        """One measured episode into the replay buffer, and `GRADIENT_STEPS` steps of actor and critic."""
        reward = self.problem.score(outcome) / POINTS_PER_REWARD
        before = reward if self._baseline is None else self._baseline
        self._baseline = BASELINE_DECAY * before + (1 - BASELINE_DECAY) * reward
        ratios, groups = dict(candidate.ratios), self.problem.space.groups
        replay = self._agent.replay_buffer
        assert replay is not None, "off-policy agents have one"
        for place, group in enumerate(groups):
            action = ratios[group.layers[0]] / self.problem.space.largest * 2 - 1
            replay.add(
                self._state(place, ratios),
                self._state(place + 1, ratios),
                np.array([action], dtype=np.float32),
                np.array([reward - self._baseline]),
                np.array([place == len(groups) - 1]),
                [{}],
            )
        with _seeded(f"{self.problem.seed} {len(self._learned)}"):
            self._agent.train(GRADIENT_STEPS, BATCH)
        self._learned.append((candidate, outcome))


class _Shapes(gymnasium.Env):
    """Tells the agent the shapes of states and actions; its episodes come from the history of the search."""

    def __init__(self, states: int) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (states,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """The library draws from the global generators of NumPy and torch, which are put back afterwards."""
    seed, kept = random.Random(text).getrandbits(32), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(kept)
