import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;

/**
 * Answers each line with its number on the connection, and sends {@code tick N} every 20 ms. Writes its
 * port to the file that its argument names.
 */
public class Selecting {
    private static final ScheduledExecutorService TIMERS = Executors.newScheduledThreadPool(2);

    private static class Client {
        final SocketChannel channel;
        final StringBuilder line = new StringBuilder();
        int number;
        int ticks;
        ScheduledFuture<?> timer;

        Client(SocketChannel channel) {
            this.channel = channel;
        }

        synchronized void say(String text) throws IOException {
            ByteBuffer bytes = ByteBuffer.wrap((text + "\n").getBytes(StandardCharsets.UTF_8));
            while (bytes.hasRemaining()) {
                if (channel.write(bytes) == 0) {
                    Thread.onSpinWait();
                }
            }
        }

        void tick() {
            try {
                say("tick " + ++ticks);
            } catch (IOException gone) {
                timer.cancel(false);
            }
        }

        /** Reads what there is; false at the end. */
        boolean read(ByteBuffer buffer) throws IOException {
            buffer.clear();
            if (channel.read(buffer) < 0) {
                return false;
            }
            buffer.flip();
            while (buffer.hasRemaining()) {
                char c = (char) buffer.get();
                if (c != '\n') {
                    line.append(c);
                    continue;
                }
                say(++number + " " + line);
                line.setLength(0);
            }
            return true;
        }
    }

    public static void main(String[] arguments) throws IOException {
        Selector selector = Selector.open();
        ServerSocketChannel server = ServerSocketChannel.open();
        server.bind(new InetSocketAddress("127.0.0.1", 0));
        server.configureBlocking(false);
        server.register(selector, SelectionKey.OP_ACCEPT);
        int port = ((InetSocketAddress) server.getLocalAddress()).getPort();
        Path path = Path.of(arguments[0]);
        Path early = Path.of(arguments[0] + ".new");
        Files.writeString(early, Integer.toString(port));
        Files.move(early, path, StandardCopyOption.ATOMIC_MOVE);
        ByteBuffer buffer = ByteBuffer.allocateDirect(1 << 16);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    Client client = new Client(server.accept());
                    client.channel.configureBlocking(false);
                    client.channel.register(selector, SelectionKey.OP_READ, client);
                    client.timer =
                            TIMERS.scheduleAtFixedRate(client::tick, 20, 20, TimeUnit.MILLISECONDS);
                } else {
                    Client client = (Client) key.attachment();
                    boolean more;
                    try {
                        more = client.read(buffer);
                    } catch (IOException gone) {
                        more = false;
                    }
                    if (!more) {
                        client.timer.cancel(false);
                        client.channel.close();
                    }
                }
            }
            selector.selectedKeys().clear();
        }
    }
}
