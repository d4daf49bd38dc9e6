//! `netdelay TAP_A TAP_B ONE_WAY_MS MBIT_PER_S`: a network link in user space.
//!
//! The program makes two TAP devices. Every Ethernet frame that is written to one comes out of the other as late as
//! on a real link. The frame waits in a queue, is sent at the link's rate, and travels for the one-way delay. A frame
//! that would wait longer than [`QUEUE_LIMIT`] is dropped: that is how TCP learns the rate. So handshakes, slow start
//! and TLS see a true round trip. The kernel's `netem` does the same, but not every kernel has it.
//!
//! A line "ready" on stdout says that both devices exist. They disappear with the process.

mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};

/// Longest time that a frame waits in the queue: a router's buffer of 200 ms. One flow can fill any emulated link
/// with it. A shorter queue would drop frames before the link is full; a longer one would delay frames more than a
/// real router.
const QUEUE_LIMIT: Duration = Duration::from_millis(200);

/// Size of the read buffer in bytes, larger than any frame. The kernel returns one frame for each read, up to 64 KiB
/// with offloads.
const MAX_FRAME: usize = 70_000;

/// Properties of one direction of the link.
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

/// The transmitter of a link, and the time from which it is idle.
#[derive(Debug)]
struct Transmitter {
    link: Link,
    idle_at: Instant,
}

impl Transmitter {
    /// Returns when a frame that arrives at `now` comes out at the far end, or `None` if the queue is full.
    fn schedule(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        let start = self.idle_at.max(now);
        if start - now > QUEUE_LIMIT {
            return None;
        }
        self.idle_at = start + self.link.transmission_time(bytes);
        Some(self.idle_at + self.link.delay)
    }
}

/// Delivery time of a frame, and the frame.
type InFlight = (Instant, Vec<u8>);

/// Reads frames from a device as long as the device exists.
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

/// Delivers frames to a device, each at its time. Frames are due in the order of the queue.
fn deliver(mut to: &File, queue: Receiver<InFlight>) {
    for (due, frame) in queue {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is down refuses frames (EIO), like an unplugged cable.
        let _lost = to.write(&frame);
    }
}

/// Starts one direction of the link. Reports the error that ends it.
fn connect(from: Arc<File>, to: Arc<File>, link: Link, failures: Sender<Error>) {
    let (sender, receiver) = channel();
    thread::spawn(move || deliver(&to, receiver));
    thread::spawn(move || {
        if let Err(error) = accept(&from, link, sender) {
            // If the other direction has failed already, the receiver is gone.
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
    // The first failure ends both directions, because half a link is useless.
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
