"Version, requirements and extras come from settings.ini; this file only reads it."
from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
extras["all"] = sorted({r for name, reqs in extras.items() if name != "docs" for r in reqs})

setup(version=cfg["version"], packages=find_packages(include=["timet_nb", "timet_nb.*"]),
      install_requires=cfg["requirements"].split(), extras_require=extras)
