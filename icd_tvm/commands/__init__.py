"""The commands of ``icd``, a module each: ``parser()`` and ``run(arguments)``."""
