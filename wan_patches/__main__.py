"""`python -m wan_patches`, the same as the console command `wan-patches`."""

from wan_patches.cli import main

if __name__ == "__main__":
    main()
