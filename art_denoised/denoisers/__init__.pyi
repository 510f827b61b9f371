from .architectures import DnCNN as DnCNN
from .architectures import MemNet as MemNet
from .architectures import UNetDenoiser as UNetDenoiser
from .checkpoints import check_saveable as check_saveable
from .checkpoints import load_denoiser as load_denoiser
from .checkpoints import save_denoiser as save_denoiser
from .one_shot import OneShotDenoiser as OneShotDenoiser
