//! `netdelay TAP_A TAP_B ONE_WAY_MS MBIT_PER_S`: a network link in user space.
//!
//! Two TAP devices are made, and every Ethernet frame written to one comes out of the other as late as it would from a
//! real link: it waits its turn in a queue, is sent at the link's rate, and travels for the one-way delay. A frame that
//! would wait longer than [`QUEUE_LIMIT`] is dropped, which is how TCP learns the rate. So handshakes, slow start and TLS
//! see a true round trip, without the kernel's `netem`, which not every kernel has.
//!
//! A line "ready" on stdout says that both devices exist. They go away with the process.

mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};

/// The longest that a frame queues for the link: a router's buffer of 200 ms, enough for one flow to fill any link that
/// is emulated here.
const QUEUE_LIMIT: Duration = Duration::from_millis(200);

/// Larger than any frame: the kernel hands over one frame for each read, up to 64 KiB with offloads.
const MAX_FRAME: usize = 70_000;

/// What one direction of the link does to frames.
#[derive(Clone, Copy, Debug)]
struct Link {
    delay: Duration,
    bits_per_second: f64,
}

impl Link {
    fn transmission_time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 * 8.0 / self.bits_per_second)
    }
}

/// When a link's transmitter falls idle, and so when the next frame may start.
#[derive(Debug)]
struct Transmitter {
    link: Link,
    idle_at: Instant,
}

impl Transmitter {
    /// When a frame that arrives now comes out at the far end, or `None` if the queue is full.
    fn schedule(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        let start = self.idle_at.max(now);
        if start - now > QUEUE_LIMIT {
            return None;
        }
        self.idle_at = start + self.link.transmission_time(bytes);
        Some(self.idle_at + self.link.delay)
    }
}

/// A frame and when it is to be delivered.
type InFlight = (Instant, Vec<u8>);

/// Takes frames from a device for as long as it exists.
fn accept(mut from: &File, link: Link, queue: Sender<InFlight>) -> Result<()> {
    let mut transmitter = Transmitter {
        link,
        idle_at: Instant::now(),
    };
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let bytes = from.read(&mut frame).context("cannot read from a TAP device")?;
        if let Some(due) = transmitter.schedule(Instant::now(), bytes) {
            queue
                .send((due, frame[..bytes].to_vec()))
                .context("the delivering thread has ended")?;
        }
    }
}

/// Delivers frames to a device, each at its time. They are due in the order in which they were queued.
fn deliver(mut to: &File, queue: Receiver<InFlight>) {
    for (due, frame) in queue {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is down refuses frames (EIO), as an unplugged cable would.
        let _lost = to.write(&frame);
    }
}

/// Starts one direction of the link; what ends it is reported.
fn connect(from: Arc<File>, to: Arc<File>, link: Link, failures: Sender<Error>) {
    let (sender, receiver) = channel();
    thread::spawn(move || deliver(&to, receiver));
    thread::spawn(move || {
        if let Err(error) = accept(&from, link, sender) {
            // Nobody listens any more when the other direction has failed before.
            let _reported = failures.send(error);
        }
    });
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [left, right, delay, rate] = arguments.as_slice() else {
        bail!("usage: netdelay TAP_A TAP_B ONE_WAY_MS MBIT_PER_S");
    };
    let delay: f64 = delay.parse().context("ONE_WAY_MS is not a number")?;
    let rate: f64 = rate.parse().context("MBIT_PER_S is not a number")?;
    if !((0.0..1e6).contains(&delay) && rate > 0.0 && rate.is_finite()) {
        bail!("the delay has to be from 0 ms to 1000 s and the rate above 0");
    }
    let link = Link {
        delay: Duration::from_secs_f64(delay / 1e3),
        bits_per_second: rate * 1e6,
    };
    let (left, right) = (Arc::new(tap::create(left)?), Arc::new(tap::create(right)?));
    println!("ready");
    let (failures, failure) = channel();
    connect(right.clone(), left.clone(), link, failures.clone());
    connect(left, right, link, failures);
    // Half a link is of no use: the first failure ends both.
    Err(failure.recv().context("both directions of the link have ended")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_queue_for_the_link_and_are_dropped_when_the_queue_is_full() {
        let now = Instant::now();
        let link = Link {
            delay: Duration::from_millis(10),
            bits_per_second: 8e6,
        };
        let mut transmitter = Transmitter { link, idle_at: now };
        // 1000 bytes take 1 ms at 8 Mbit/s.
        assert_eq!(transmitter.schedule(now, 1000), Some(now + Duration::from_millis(11)));
        assert_eq!(transmitter.schedule(now, 1000), Some(now + Duration::from_millis(12)));
        let sent = (0..1000).filter(|_| transmitter.schedule(now, 1000).is_some()).count();
        assert_eq!(sent, 199, "200 ms of queue, two frames of which were there before");
        assert_eq!(
            transmitter.schedule(now + Duration::from_secs(1), 1000),
            Some(now + Duration::from_millis(1011))
        );
    }
}
