"""What is trained: dense and locally connected networks; adapters for flax modules."""

from dbjax.models.adapters import from_linen as from_linen
from dbjax.models.adapters import from_nnx as from_nnx
from dbjax.models.base import Model as Model
from dbjax.models.dense import dense as dense
from dbjax.models.dense import exchanged_bytes as exchanged_bytes
from dbjax.models.dense import logistic_regression as logistic_regression
from dbjax.models.dense import speech as speech
from dbjax.models.locally_connected import locally_connected as locally_connected
from dbjax.models.vision import vision as vision
