from .denoisers import DnCNN as DnCNN
from .denoisers import MemNet as MemNet
from .denoisers import OneShotDenoiser as OneShotDenoiser
from .denoisers import UNetDenoiser as UNetDenoiser
from .denoisers import load_denoiser as load_denoiser
from .denoisers import save_denoiser as save_denoiser
