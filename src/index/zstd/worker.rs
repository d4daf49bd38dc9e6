//! A thread that chooses restarts beside the thread that decodes.
//!
//! Following the blocks takes about as long as decoding them, so it would slow a pass down. The thread starts with
//! the first frame that is worth following. Both queues between the threads are bounded: one by its capacity, the other
//! by the number of blocks.
//!
//! If the thread falls behind, the pass would have to wait for it. So the pass then does a part of the thread's work: it
//! decodes a block's sequences itself, if the block uses no table of an earlier block.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::block::Follower;
use super::frame::{BlockKind, FrameHeader};
use super::planner::{DecodedBlock, Planner};
use super::sequences::Sequence;
use crate::index::step::SpanRestart;

/// Blocks that wait for the thread. With fewer of them, one thread waits for the other more often. With more of them, a
/// pass takes more memory.
const QUEUE: usize = 12;
/// Bytes of the sequences that the pass decodes of a block, at most. Most blocks have about half as many. With more, the
/// queue takes more memory.
const SEQUENCES: usize = 128 << 10;

/// What the thread is told.
#[derive(Debug)]
enum PlannerMessage {
    Begin(FrameHeader, u64),
    Block(DecodedBlock),
    GiveUp,
    End,
}

/// What the thread returns: restarts that it chose, or a block whose buffers can be used again.
#[derive(Debug)]
enum Returned {
    Chosen(Vec<SpanRestart>),
    Used(DecodedBlock),
}

/// The thread of a planner.
#[derive(Debug)]
struct PlannerThread {
    told: SyncSender<PlannerMessage>,
    returned: Receiver<Returned>,
    thread: JoinHandle<()>,
}

/// A planner in a thread of its own. If there is no thread to be had, there are no restarts inside frames.
#[derive(Debug)]
pub(super) struct PlannerWorker {
    spacing: u64,
    running: Option<PlannerThread>,
    refused: bool,
    buffers: Vec<DecodedBlock>,
    chosen: Vec<SpanRestart>,
}

impl PlannerWorker {
    /// Bytes of memory in the queues, and of free buffers: a block's content and its output are at most 128 KiB each. The
    /// thread itself has the sequences of a block, which may take half a megabyte.
    pub(super) const MEMORY: u64 = (QUEUE as u64 + 6) * ((256 << 10) + SEQUENCES as u64) + (512 << 10);

    pub(super) fn new(spacing: u64) -> Self {
        Self {
            spacing,
            running: None,
            refused: false,
            buffers: Vec::new(),
            chosen: Vec::new(),
        }
    }

    /// Begins a frame, of which the first block is at blob offset `offset`. Returns whether it is followed.
    pub(super) fn begin(&mut self, header: FrameHeader, offset: u64) -> bool {
        if self.running.is_none() && !self.refused {
            self.start();
        }
        self.tell(PlannerMessage::Begin(header, offset));
        self.running.is_some()
    }

    fn start(&mut self) {
        let (told, inbox) = sync_channel(QUEUE);
        let (outbox, returned) = channel();
        let mut planner = Planner::new(self.spacing);
        let work = move || {
            for told in inbox {
                match told {
                    PlannerMessage::Begin(header, offset) => planner.begin(header, offset),
                    PlannerMessage::Block(mut block) => {
                        planner.block(&mut block);
                        // The receiver lives as long as the sender of `inbox`.
                        drop(outbox.send(Returned::Used(block)));
                    }
                    PlannerMessage::GiveUp => planner.give_up(),
                    PlannerMessage::End => planner.end(),
                }
                let chosen = planner.take();
                if !chosen.is_empty() {
                    drop(outbox.send(Returned::Chosen(chosen)));
                }
            }
        };
        let thread = thread::Builder::new().name("zstd restarts".into()).spawn(work);
        self.refused = thread.is_err();
        self.running = thread.ok().map(|thread| PlannerThread { told, returned, thread });
    }

    /// Takes a block.
    pub(super) fn block(&mut self, mut block: DecodedBlock) {
        let Some(running) = &self.running else { return };
        block.are_decoded = false;
        let mut message = match running.told.try_send(PlannerMessage::Block(block)) {
            Ok(()) => return,
            Err(TrySendError::Full(refused) | TrySendError::Disconnected(refused)) => refused,
        };
        if let PlannerMessage::Block(block) = &mut message {
            // If this fails, the thread tries it again.
            block.are_decoded = decode(block).is_some();
        }
        self.tell(message);
    }

    /// Gives up the frame.
    pub(super) fn give_up(&mut self) {
        self.tell(PlannerMessage::GiveUp);
    }

    /// Ends the frame.
    pub(super) fn end(&mut self) {
        self.tell(PlannerMessage::End);
    }

    fn tell(&mut self, told: PlannerMessage) {
        if let Some(running) = &self.running
            && running.told.send(told).is_err()
        {
            // The thread panicked.
            self.join();
        }
    }

    /// Returns buffers for a block, if there are any to use again.
    pub(super) fn buffers(&mut self) -> Option<DecodedBlock> {
        self.look();
        self.buffers.pop()
    }

    /// Returns the restarts that were chosen since the last call.
    pub(super) fn take(&mut self) -> Vec<SpanRestart> {
        self.look();
        std::mem::take(&mut self.chosen)
    }

    fn look(&mut self) {
        if let Some(running) = &self.running {
            for returned in running.returned.try_iter() {
                match returned {
                    Returned::Chosen(chosen) => self.chosen.extend(chosen),
                    Returned::Used(block) => self.buffers.push(block),
                }
            }
        }
    }

    /// Waits until everything is decided.
    pub(super) fn finish(&mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(PlannerThread { told, returned, thread }) = self.running.take() else {
            return;
        };
        drop(told);
        let outcome = thread.join();
        for returned in returned {
            if let Returned::Chosen(chosen) = returned {
                self.chosen.extend(chosen);
            }
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Decodes the sequences of a block. Returns `None` if it is not compressed, is not understood, uses tables of earlier
/// blocks or has too many sequences.
fn decode(block: &mut DecodedBlock) -> Option<()> {
    if block.kind != BlockKind::Compressed {
        return None;
    }
    let mut follower = Follower::new();
    let parts = follower.read(&block.content)?;
    if parts.count * size_of::<Sequence>() > SEQUENCES {
        return None;
    }
    follower.sequences(&block.content, &parts, &mut block.sequences)
}
