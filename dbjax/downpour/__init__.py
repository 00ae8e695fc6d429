"""Downpour SGD: train, simulate, replay, probe, sweep; replica and protocols."""

from dbjax.downpour.methods import async_diloco as async_diloco
from dbjax.downpour.methods import diloco as diloco
from dbjax.downpour.methods import easgd as easgd
from dbjax.downpour.methods import parameter_averaging as parameter_averaging
from dbjax.downpour.methods import proportional_steps as proportional_steps
from dbjax.downpour.probe import probe as probe
from dbjax.downpour.protocol import asynchronous as asynchronous
from dbjax.downpour.protocol import synchronous as synchronous
from dbjax.downpour.replay import replay as replay
from dbjax.downpour.simulate import simulate as simulate
from dbjax.downpour.sweep import sweep as sweep
from dbjax.downpour.train import train as train
