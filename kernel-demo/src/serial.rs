//! Output on the first serial port.

use core::fmt::{self, Write};

use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::{Config, Uart16550};

/// The first serial port's I/O address on a PC.
const COM1: u16 = 0x3f8;

static PORT: Mutex<Option<Uart16550<PioBackend>>> = Mutex::new(None);

pub(crate) fn init() {
    // SAFETY: COM1 is a PC's first serial port, and only this module uses it.
    let Ok(mut port) = (unsafe { Uart16550::new_port(COM1) }) else { return };
    // Without a port there is no output, and the run fails for want of the sentinel.
    if port.init(Config::default()).is_ok() {
        *PORT.lock() = Some(port);
    }
}

struct Output<'a>(&'a mut Uart16550<PioBackend>);

impl Write for Output<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.send_bytes_exact(text.as_bytes());
        Ok(())
    }
}

/// Prints to the serial port; use [`println!`](crate::println).
pub fn print(arguments: fmt::Arguments<'_>) {
    // An interrupt handler that prints while the lock is held would wait for ever.
    x86_64::instructions::interrupts::without_interrupts(|| {
        if let Some(port) = PORT.lock().as_mut() {
            // A serial port does not fail.
            let _ = Output(port).write_fmt(arguments);
        }
    });
}

/// Prints without waiting for the lock, for a panic that struck while it was held.
pub(crate) fn print_from_panic(arguments: fmt::Arguments<'_>) {
    // SAFETY: this is the last output of the one CPU; whoever held the lock does not go on.
    unsafe { PORT.force_unlock() };
    print(arguments);
}

/// Prints a line to the serial port.
#[macro_export]
macro_rules! println {
    () => {
        $crate::serial::print(format_args!("\n"))
    };
    ($($argument:tt)*) => {
        $crate::serial::print(format_args!("{}\n", format_args!($($argument)*)))
    };
}
