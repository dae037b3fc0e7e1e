from spannorm.cli import main

main()
