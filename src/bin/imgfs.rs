//! Shows chains of image directories; see `imgfs --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    rcriu::cli::imgfs::main()
}
