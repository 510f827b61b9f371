from .architectures import DnCNN as DnCNN
from .architectures import MemNet as MemNet
from .architectures import OneShotDenoiser as OneShotDenoiser
from .architectures import UNetDenoiser as UNetDenoiser
from .checkpoints import load_denoiser as load_denoiser
from .checkpoints import save_denoiser as save_denoiser
