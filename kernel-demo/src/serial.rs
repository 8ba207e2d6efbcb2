//! Output on the first serial port.

use core::fmt::{self, Write};

use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::{Config, Uart16550};

use crate::ports;

static PORT: Mutex<Option<Uart16550<PioBackend>>> = Mutex::new(None);

/// Configures the port. A machine without the port prints nothing, and its run fails for lack of the sentinel.
pub(crate) fn init() {
    let Some(mut port) = ports::serial() else { return };
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

/// Prints to the serial port. Use [`println!`](crate::println) for whole lines.
pub fn print(arguments: fmt::Arguments<'_>) {
    // With interrupts on, a handler that prints would wait forever for the lock of the code it interrupted.
    x86_64::instructions::interrupts::without_interrupts(|| send(PORT.lock().as_mut(), arguments));
}

/// Prints for a panic, which may occur while [`print`] holds the lock.
pub(crate) fn print_from_panic(arguments: fmt::Arguments<'_>) {
    x86_64::instructions::interrupts::without_interrupts(|| match PORT.try_lock() {
        Some(mut port) => send(port.as_mut(), arguments),
        // The holder of the lock never goes on. The port is configured already.
        None => send(ports::serial().as_mut(), arguments),
    });
}

fn send(port: Option<&mut Uart16550<PioBackend>>, arguments: fmt::Arguments<'_>) {
    if let Some(port) = port {
        // Only a `Display` implementation can fail: `Output` never does.
        let _ = Output(port).write_fmt(arguments);
    }
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
