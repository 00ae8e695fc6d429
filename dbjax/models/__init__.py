"""What is trained: dense and locally connected networks; adapters for flax modules."""

from dbjax.models.base import Model as Model
