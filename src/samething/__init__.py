"""samething: find the same thing in any collection of images.

Importing the package does nothing but name its version; every stage is a module with a function of the
same name (``from samething.features import features``), which is also the command ``samething features``.
"""

__version__ = "0.2.0"
