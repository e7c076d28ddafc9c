"""Reports: pages about runs and studies, made from their records alone; they are drawn with matplotlib."""

from bandpo.plots import need_matplotlib

need_matplotlib()
