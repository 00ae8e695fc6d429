"""Device meshes, and where parameters lie on them."""

from dbjax.mesh.costs import partition_costs as partition_costs
from dbjax.mesh.memory import check_memory as check_memory
from dbjax.mesh.memory import device_memory as device_memory
from dbjax.mesh.memory import estimate_memory as estimate_memory
from dbjax.mesh.meshes import REPLICA as REPLICA
from dbjax.mesh.meshes import make_mesh as make_mesh
from dbjax.mesh.meshes import sub_meshes as sub_meshes
from dbjax.mesh.rules import Rules as Rules
from dbjax.mesh.rules import batch_sharding as batch_sharding
from dbjax.mesh.rules import shard_params as shard_params
from dbjax.mesh.rules import shardings as shardings
