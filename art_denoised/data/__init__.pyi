from .images import ImageData as ImageData
from .images import ImageFolder as ImageFolder
from .images import Shard as Shard
from .images import digits as digits
from .images import load_data as load_data
from .images import read_classes as read_classes
from .images import select as select
