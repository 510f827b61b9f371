from .entries import Entry as Entry
from .entries import check as check
from .entries import leaderboard as leaderboard
from .entries import read_entries as read_entries
from .entries import submit as submit
from .entries import write_page as write_page
