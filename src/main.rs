//! The `ocifs` command; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ocifs::cli::main()
}
