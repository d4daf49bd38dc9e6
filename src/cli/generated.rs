//! `ocifs completions` and the hidden `ocifs man`: what is made from the definition of the command line, so that it cannot
//! differ from what the command does.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use clap_complete::Shell;
use roff::{Roff, roman};

/// The day of the version, as in src/docs/changelog.md.
const DATE: &str = "2026-11-30";

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Shell that completes the words
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Directory of the pages
    directory: PathBuf,
}

/// Writes the script that completes the command line `command`.
pub(super) fn completions(mut command: clap::Command, args: &CompletionsArgs) -> anyhow::Result<()> {
    let name = command.get_name().to_owned();
    // The generators panic if the writer fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    io::Write::write_all(&mut io::stdout(), &script)?;
    Ok(())
}

/// Writes the manual pages of `command` and of all its subcommands that help shows.
pub(super) fn man(command: clap::Command, args: &ManArgs) -> anyhow::Result<()> {
    let source = format!("{} {}", command.get_name(), command.get_version().unwrap_or_default());
    // What `ocifs help` says is in the pages.
    let mut command = command.disable_help_subcommand(true);
    // Gives each subcommand its whole name, and the global options.
    command.build();
    pages(&command, &source, &args.directory)
}

fn pages(command: &clap::Command, source: &str, directory: &Path) -> anyhow::Result<()> {
    let more = command.get_after_long_help().map(ToString::to_string);
    // The generator would fill the lines of a table.
    let man = clap_mangen::Man::new(command.clone().after_long_help(None::<&str>));
    let man = man.source(source).date(DATE).manual("ocifs");
    let mut page = Vec::new();
    man.render(&mut page)?;
    if let Some(more) = more {
        let mut section = Roff::new();
        section.control("SH", ["NOTES"]).control("nf", []);
        for line in more.lines() {
            section.text([roman(line)]);
        }
        section.control("fi", []).to_writer(&mut page)?;
    }
    let path = directory.join(man.get_filename());
    std::fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    let mut shown = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    shown.try_for_each(|subcommand| pages(subcommand, source, directory))
}
