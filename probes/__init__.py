"""Look inside a live model and change nothing: likelihood, Fisher information, statistics.

Nothing here touches a disk, a configuration file or a console. Import the modules you need;
this package imports none of them, so that `import unlearn` stays light.
"""
