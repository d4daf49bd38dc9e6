//! Compares the indexes at all locations with those that a pass on this host makes.

use anyhow::bail;

use super::super::config::Config;
use super::super::json::versioned;
use super::super::open::context;
use super::super::{Fetching, say};
use super::{VerifyArgs, needs_index, open};
use ocifs::layer::export;
use ocifs::published::{Compared, Difference, IndexFile};

/// Compares the indexes of all layers of an image. Fails if any differs, or cannot be compared.
pub(super) fn verify(config: &Config, fetching: &Fetching, args: &VerifyArgs) -> anyhow::Result<()> {
    if config.index.is_empty() {
        bail!("there is no index location to compare with: name one with --index, or in the configuration file");
    }
    let verified = fetching.run(async {
        let locations = context(config)?.locations;
        let (context, image) = open(config, fetching, &args.image).await?;
        let comparison = locations.comparison(&image.resolved().manifest_document.digest);
        let mut verified = Verified::default();
        let mut seen = std::collections::HashSet::new();
        for layer in image.layers().iter().filter(|layer| needs_index(layer)) {
            if !seen.insert(layer.digest().clone()) {
                continue;
            }
            let own = export(layer.clone()).await?;
            if own.encode().len() > IndexFile::longest(own.size) {
                eprintln!(
                    "the index of {} is too long for other hosts, so there is nothing to compare",
                    own.layer
                );
                continue;
            }
            for compared in comparison.compare(&context.store, &own).await {
                verified.count(compared);
            }
        }
        anyhow::Ok(verified)
    })?;
    verified.show(args.json)?;
    let Verified {
        differences,
        troubles,
        compared,
        ..
    } = verified;
    match (differences.len(), troubles.len()) {
        (0, 0) => Ok(()),
        (0, n) => bail!("{n} indexes cannot be compared, because their locations cannot be asked"),
        (n, _) => {
            bail!("{n} of {compared} indexes differ from what the layers contain; do not use these locations or keys")
        }
    }
}

/// What a comparison of all layers with all places has found.
#[derive(Debug, Default)]
struct Verified {
    differences: Vec<Difference>,
    /// Why places could not be asked, for each index that was not compared.
    troubles: Vec<String>,
    compared: usize,
    missing: usize,
}

impl Verified {
    fn count(&mut self, compared: Compared) {
        match (&compared.trouble, compared.is_there) {
            (_, true) => self.compared += 1,
            (None, false) => self.missing += 1,
            (Some(_), false) => {}
        }
        self.differences.extend(compared.difference);
        self.troubles.extend(compared.trouble.map(|error| error.to_string()));
    }

    fn show(&self, json: bool) -> anyhow::Result<()> {
        if json {
            let objects = self.differences.iter().map(|difference| {
                serde_json::json!({
                    "location": difference.place, "authority": difference.authority.to_string(),
                    "layer": difference.layer, "differs": difference.parts,
                })
            });
            let differences: Vec<_> = objects.collect();
            say!(
                "{}",
                versioned(serde_json::json!({
                    "compared": self.compared, "missing": self.missing, "differences": differences,
                    "troubles": self.troubles,
                }))?
            );
            return Ok(());
        }
        for difference in &self.differences {
            say!(
                "differs: {} at {} (believed by {}): {}",
                difference.layer,
                difference.place,
                difference.authority,
                difference.parts.join(", ")
            );
        }
        for trouble in &self.troubles {
            say!("not compared: {trouble}");
        }
        say!("{} indexes compared, {} not there", self.compared, self.missing);
        Ok(())
    }
}
