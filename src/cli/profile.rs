//! `ocifs profile`: shows, exports and imports profiles. A profile has what starts of an image's programs have read.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::config::Config;
use super::json::versioned;
use super::open::{context, resolve};
use super::say;
use super::units::human;
use super::{Fetching, ImageArgs};
use ocifs::image::{Learning, Preparation, stored_profile};
use ocifs::layer::LayerContext;
use ocifs::profile::{LARGEST_FILE, Label, Profile};

/// Number of ranges that `profile show` prints. `--json` prints all of them.
const SHOWN: usize = 20;

/// Commands of `profile`.
#[derive(Debug, Subcommand)]
pub(super) enum ProfileCommand {
    /// Show what is known of the starts of an image's programs
    Show(ShowArgs),
    /// Write a profile to a file, or to standard output, for another machine
    Export(ProfileExportArgs),
    /// Take a profile from a file, or from standard input, in place of what is known
    Import(ProfileImportArgs),
}

/// Arguments of `profile show`.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Show the ranges of the profile with this label [default: all labels, without ranges]
    #[arg(long, value_name = "LABEL")]
    profile: Option<Label>,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Arguments of `profile export`.
#[derive(Debug, Args)]
pub(super) struct ProfileExportArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Label of the profile: which of the image's programs it is for
    #[arg(long, value_name = "LABEL", default_value = "default")]
    profile: Label,
    /// Write to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Arguments of `profile import`.
#[derive(Debug, Args)]
pub(super) struct ProfileImportArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// File to read, `-` for standard input
    file: PathBuf,
    /// Label to keep it under [default: the one in the file]
    #[arg(long, value_name = "LABEL")]
    profile: Option<Label>,
}

pub(super) fn run(config: &Config, fetching: &Fetching, command: ProfileCommand) -> anyhow::Result<()> {
    match command {
        ProfileCommand::Show(args) => show(config, fetching, &args),
        ProfileCommand::Export(args) => export(config, fetching, &args),
        ProfileCommand::Import(args) => import(config, fetching, &args),
    }
}

/// Opens the store and resolves the image. A store that cannot be opened is an error.
fn open(config: &Config, fetching: &Fetching, image: &ImageArgs) -> anyhow::Result<(LayerContext, Arc<Preparation>)> {
    let context = context(config)?;
    if let Some(problem) = context.health.store_problem() {
        bail!(problem);
    }
    let preparation = fetching.run(resolve(config, image, &context.store))?.preparation;
    Ok((context, preparation))
}

fn show(config: &Config, fetching: &Fetching, args: &ShowArgs) -> anyhow::Result<()> {
    let (context, preparation) = open(config, fetching, &args.image)?;
    let manifest = &preparation.resolved().manifest_document.digest;
    let labels = match &args.profile {
        Some(label) => vec![label.clone()],
        None => context
            .store
            .profile_labels(manifest)?
            .iter()
            .filter_map(|l| l.parse().ok())
            .collect(),
    };
    let found = labels
        .iter()
        .filter_map(|label| stored_profile(&context.store, manifest, label));
    let profiles: Vec<Profile> = found.collect();
    if profiles.is_empty() && args.profile.is_some() {
        return Err(unknown(&args.image.image, &labels[0]));
    }
    if args.json {
        let objects: Result<Vec<serde_json::Value>, _> = profiles
            .iter()
            .map(|profile| serde_json::from_slice(&profile.encode()))
            .collect();
        say!("{:#}", versioned(objects?)?);
        return Ok(());
    }
    for profile in &profiles {
        summary(profile)?;
        if args.profile.is_some() {
            ranges(profile)?;
        }
    }
    if profiles.is_empty() {
        eprintln!("no start of {} has been learned yet", args.image.image);
    }
    Ok(())
}

fn summary(profile: &Profile) -> anyhow::Result<()> {
    let mut layers: HashMap<usize, u64> = HashMap::new();
    for (layer, range) in profile.ranges() {
        *layers.entry(layer).or_default() += range.end - range.start;
    }
    let bytes = layers.values().sum();
    say!(
        "{:<20} {:>4} {:<4}  {:>10} in {} of {} layers",
        profile.label,
        profile.runs,
        if profile.runs == 1 { "run" } else { "runs" },
        human(bytes),
        layers.len(),
        profile.layers.len()
    );
    Ok(())
}

/// Prints the first [`SHOWN`] ranges of a profile, with adjacent ranges merged.
fn ranges(profile: &Profile) -> anyhow::Result<()> {
    let mut merged: Vec<(u32, usize, std::ops::Range<u64>)> = Vec::new();
    for ((layer, range), touch) in profile.ranges().zip(&profile.touches) {
        match merged.last_mut() {
            Some((_, last, run)) if (*last, run.end) == (layer, range.start) => run.end = range.end,
            _ => merged.push((touch.at, layer, range)),
        }
    }
    say!("");
    say!("{:>8}  {:<19} {:>14} {:>10}", "AFTER", "LAYER", "OFFSET", "BYTES");
    for (at, layer, range) in merged.iter().take(SHOWN) {
        let digest = profile.layers[*layer].digest.to_string();
        let bytes = human(range.end - range.start);
        say!(
            "{at:>5} ms  {:<19} {:>14} {bytes:>10}",
            digest.get(..19).unwrap_or(&digest),
            range.start
        );
    }
    if merged.len() > SHOWN {
        say!("and {} more ranges (--json has all)", merged.len() - SHOWN);
    }
    Ok(())
}

fn export(config: &Config, fetching: &Fetching, args: &ProfileExportArgs) -> anyhow::Result<()> {
    let (context, preparation) = open(config, fetching, &args.image)?;
    let manifest = &preparation.resolved().manifest_document.digest;
    let profile = stored_profile(&context.store, manifest, &args.profile);
    let encoded = profile
        .ok_or_else(|| unknown(&args.image.image, &args.profile))?
        .encode();
    match &args.output {
        Some(path) => std::fs::write(path, encoded).with_context(|| format!("{}", path.display())),
        None => Ok(std::io::stdout().write_all(&encoded)?),
    }
}

fn unknown(image: &str, label: &Label) -> anyhow::Error {
    anyhow::anyhow!(
        "no start of {image} with the label `{label}` has been learned: mount it with `--profile {label}` and run the program"
    )
}

fn import(config: &Config, fetching: &Fetching, args: &ProfileImportArgs) -> anyhow::Result<()> {
    let profile = Profile::decode(&read(&args.file)?).with_context(|| format!("{}", args.file.display()))?;
    let (context, preparation) = open(config, fetching, &args.image)?;
    let label = args.profile.clone().unwrap_or_else(|| profile.label.clone());
    let mut learning = Learning::find(
        &context.store,
        preparation.resolved(),
        &preparation.repository(),
        &label,
    );
    let taken = learning.import(&profile)?;
    if taken == 0 {
        bail!("{}: it is about no layer of {}", args.file.display(), args.image.image);
    }
    eprintln!("{}: {} of profile `{label}` taken over", args.image.image, human(taken));
    Ok(())
}

/// Reads a file, or standard input for `-`. Stops one byte beyond [`LARGEST_FILE`]: enough for the decoder to refuse
/// the file.
fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = LARGEST_FILE as u64 + 1;
    if path.as_os_str() == "-" {
        std::io::stdin().take(limit).read_to_end(&mut bytes)?;
    } else {
        let file = std::fs::File::open(path).with_context(|| format!("{}", path.display()))?;
        file.take(limit)
            .read_to_end(&mut bytes)
            .with_context(|| format!("{}", path.display()))?;
    }
    Ok(bytes)
}
