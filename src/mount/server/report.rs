//! The status of a mount, as the process behind it reports it.

use super::Mount;
use crate::layer;
use crate::mount::process;
use crate::mount::status::{LinkStatus, MountState, MountStatus};

impl Mount {
    pub(super) fn status(&self) -> MountStatus {
        let layers = match &self.image {
            Some(image) => image.status(),
            None => self.preparation.status(),
        };
        let record = &self.attachment.attached().record;
        let size: u64 = layers.iter().map(|l| l.size).sum();
        let fetched: u64 = layers.iter().map(|l| l.fetched).sum();
        let link = self.image.as_ref().and_then(|image| image.link());
        let (done, total) = layer::progress(&layers);
        let preparing = self.image.is_none() && self.failure.is_none();
        let mounted = self.mounted.unwrap_or_default();
        let seconds = (self.config.started.elapsed() - mounted).as_secs_f64();
        let stalled = preparing && self.stall.is_stalled();
        let rate = match stalled {
            true => Some(self.stall.rate()),
            false => (preparing && done > 0).then(|| done as f64 / seconds),
        };
        MountStatus {
            pid: record.pid,
            image: record.image.clone(),
            digest: record.digest.clone(),
            unconfirmed: self.unconfirmed.clone(),
            mountpoint: record.mountpoint.display().to_string(),
            mountpoint_base64: record.mountpoint_base64(),
            // The client fills this in, because another process may have moved the log.
            log: None,
            store: self.context.store.root().map(|root| root.display().to_string()),
            metrics: self.metrics.clone(),
            state: match (&self.image, &self.failure) {
                (Some(_), _) => MountState::Ready,
                (None, Some(_)) => MountState::Failed,
                (None, None) if stalled => MountState::Stalled,
                (None, None) => MountState::Preparing,
            },
            problem: match &self.failure {
                Some(error) => Some(error.to_string()),
                None => self.problem(),
            },
            writable: record.writable,
            via: record.carrier,
            disk: record.disk.clone(),
            uptime: self.config.started.elapsed().as_secs_f64(),
            mount_seconds: mounted.as_secs_f64(),
            ready_seconds: self.ready.map(|d| d.as_secs_f64()),
            size,
            fetched,
            fetched_for: layers.iter().map(|l| l.fetched_for).sum(),
            rate,
            stalled_seconds: stalled.then(|| self.stall.since().as_secs_f64()),
            remaining_seconds: rate
                .filter(|_| !stalled)
                .map(|rate| total.saturating_sub(done) as f64 / rate),
            memory: self.context.memory.bytes() as u64,
            resident: process::resident(),
            used: layers.iter().map(|l| l.used).sum(),
            local: layers.iter().map(|l| l.local).sum(),
            requests: layers.iter().map(|l| l.requests).sum(),
            retries: self.preparation.retries(),
            evicted: self.context.budget.evictions(),
            in_flight: self.context.lanes.load(),
            link: link.map(LinkStatus::from),
            reads: self.content.as_ref().map(|content| content.reads()).unwrap_or_default(),
            prefetch: Some(self.side.status()),
            layers,
        }
    }

    /// Returns what does not work at the moment.
    fn problem(&self) -> Option<String> {
        let reading = self.content.as_ref().and_then(|content| content.problem());
        let problems: Vec<String> = [self.context.health.store_problem(), reading]
            .into_iter()
            .flatten()
            .collect();
        match problems.is_empty() {
            true => self.preparation.trouble(),
            false => Some(problems.join("; ")),
        }
    }
}
