"""Well-known programs of public tutorials, with a tape by hand and with `train_step`.

Each program makes its networks and data anew, defines `plain` and `ours`, and returns
both and what they train: after 30 steps, the numbers must be the same.
"""

import inspect
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad import train_step

STEPS = 30
PAGE = Path(__file__).parents[2] / "docs" / "a-loop-of-ones-own.md"
PROGRAMS = {}

layers, optimizers = keras.layers, keras.optimizers
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
binary = keras.losses.BinaryCrossentropy(from_logits=True)
squares = keras.losses.MeanSquaredError()


def program(title):
    def add(function):
        PROGRAMS[title] = function
        return function

    return add


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


def digits(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).integers(0, 3, size=shape))


def net(inputs, *stack, **options):
    return keras.Sequential([keras.Input(inputs, **options), *stack])


def dense(inputs, outputs, activation="tanh"):
    hidden = layers.Dense(8, activation=activation)
    return net([inputs], hidden, layers.Dense(outputs))


@program("TensorFlow guide: basic training loops")
def basic_training():
    w, b, x = tf.Variable(5.0), tf.Variable(0.0), normal(50)
    y = 3.0 * x + 2.0

    def loss(x, y):
        return tf.reduce_mean(tf.square(y - (w * x + b)))

    def plain():
        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                value = loss(x, y)
            dw, db = tape.gradient(value, [w, b])
            w.assign_sub(0.1 * dw)
            b.assign_sub(0.1 * db)
            return value

        for _ in range(STEPS):
            step(x, y)

    def ours():
        step = train_step(loss, wrt=[w, b], optimizer="sgd", learning_rate=0.1)
        for _ in range(STEPS):
            step(x, y)

    return plain, ours, lambda: [w, b]


@program("Keras guide: a training loop from scratch")
def loop_from_scratch():
    model, x, y = dense(4, 3, "relu"), normal(64, 4), digits(64)
    optimizer = optimizers.Adam(1e-2)
    metric = keras.metrics.SparseCategoricalAccuracy()

    def plain():
        @tf.function(reduce_retracing=True)
        def step(x, y):
            with tf.GradientTape() as tape:
                logits = model(x, training=True)
                value = entropy(y, logits)
            gradients = tape.gradient(value, model.trainable_weights)
            optimizer.apply(gradients, model.trainable_weights)
            metric.update_state(y, logits)
            return value

        for k in range(STEPS):
            step(x[: 64 - k], y[: 64 - k])

    def ours():
        def loss(x, y):
            logits = model(x, training=True)
            return entropy(y, logits), logits

        step = train_step(loss, wrt=model, optimizer=optimizer, has_aux=True)
        for k in range(STEPS):
            _, logits = step(x[: 64 - k], y[: 64 - k])
            metric.update_state(y[: 64 - k], logits)

    return plain, ours, lambda: [*model.weights, metric.result()]


@program("TensorFlow tutorial: custom training walkthrough")
def walkthrough():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(10, activation="relu")
            self.last = layers.Dense(3)

        def call(self, x):
            return self.last(self.hidden(x))

    model, x, y = Model(), normal(32, 4), digits(32)
    optimizer = optimizers.SGD(0.01)

    def plain():
        def loss(model, x, y, training):
            return entropy(y, model(x, training=training))

        def grad(model, inputs, targets):
            with tf.GradientTape() as tape:
                value = loss(model, inputs, targets, training=True)
            return value, tape.gradient(value, model.trainable_variables)

        for _ in range(STEPS):
            _, gradients = grad(model, x, y)
            optimizer.apply(gradients, model.trainable_variables)

    def ours():
        def loss(x, y):
            return entropy(y, model(x, training=True))

        step = train_step(loss, wrt=model, optimizer=optimizer)
        for _ in range(STEPS):
            step(x, y)

    return plain, ours, lambda: model.weights


@program("TensorFlow tutorial: DCGAN")
def dcgan():
    generator = net(
        [5],
        layers.Dense(16, use_bias=False),
        layers.BatchNormalization(),
        layers.LeakyReLU(),
        layers.Reshape([2, 2, 4]),
        layers.Conv2DTranspose(1, 3, strides=2, padding="same", activation="tanh"),
    )
    discriminator = net(
        [4, 4, 1], layers.Conv2D(4, 3), layers.LeakyReLU(), layers.Flatten(),
        layers.Dense(1),
    )  # fmt: skip
    images, noise = normal(8, 4, 4, 1), normal(STEPS, 8, 5)

    def generator_loss(fake):
        return binary(tf.ones_like(fake), fake)

    def discriminator_loss(real, fake):
        return binary(tf.ones_like(real), real) + binary(tf.zeros_like(fake), fake)

    def plain():
        generator_optimizer = optimizers.Adam(1e-4)
        discriminator_optimizer = optimizers.Adam(1e-4)

        @tf.function
        def step(images, noise):
            with tf.GradientTape() as gen_tape, tf.GradientTape() as disc_tape:
                generated = generator(noise, training=True)
                real = discriminator(images, training=True)
                fake = discriminator(generated, training=True)
                gen_loss = generator_loss(fake)
                disc_loss = discriminator_loss(real, fake)
            gen_gradients = gen_tape.gradient(gen_loss, generator.trainable_variables)
            disc_gradients = disc_tape.gradient(
                disc_loss, discriminator.trainable_variables
            )
            generator_optimizer.apply(gen_gradients, generator.trainable_variables)
            discriminator_optimizer.apply(
                disc_gradients, discriminator.trainable_variables
            )

        for k in range(STEPS):
            step(images, noise[k])

    def ours():
        def fool(noise):
            generated = generator(noise, training=True)
            return generator_loss(discriminator(generated)), generated

        def tell(images, generated):
            return discriminator_loss(discriminator(images), discriminator(generated))

        generate = train_step(
            fool, wrt=generator, optimizer="adam", learning_rate=1e-4, has_aux=True
        )
        discriminate = train_step(tell, wrt=discriminator, learning_rate=1e-4)
        for k in range(STEPS):
            _, generated = generate(noise[k])
            discriminate(images, generated)

    return plain, ours, lambda: [*generator.weights, *discriminator.weights]


@program("Keras example: WGAN-GP")
def wgan_gp():
    generator, critic = dense(3, 4), dense(4, 1)
    images, noise, mix = normal(8, 4), normal(STEPS, 8, 3), normal(STEPS, 8, 1, seed=1)

    def plain():
        g_optimizer, c_optimizer = optimizers.Adam(1e-3), optimizers.Adam(1e-3)

        def penalty(real, fake, alpha):
            between = real + alpha * (fake - real)
            with tf.GradientTape() as tape:
                tape.watch(between)
                score = critic(between, training=True)
            slopes = tape.gradient(score, [between])[0]
            norm = tf.sqrt(tf.reduce_sum(tf.square(slopes), axis=1))
            return tf.reduce_mean((norm - 1.0) ** 2)

        @tf.function
        def step(real, noise, alpha):
            with tf.GradientTape() as tape:
                fake = generator(noise, training=True)
                score = tf.reduce_mean(critic(fake)) - tf.reduce_mean(critic(real))
                value = score + 10.0 * penalty(real, fake, alpha)
            gradients = tape.gradient(value, critic.trainable_variables)
            c_optimizer.apply(gradients, critic.trainable_variables)
            with tf.GradientTape() as tape:
                value = -tf.reduce_mean(critic(generator(noise, training=True)))
            gradients = tape.gradient(value, generator.trainable_variables)
            g_optimizer.apply(gradients, generator.trainable_variables)

        for k in range(STEPS):
            step(images, noise[k], mix[k])

    def ours():
        slopes = tfgrad.grad(lambda x: tf.reduce_sum(critic(x)))

        def tell(real, noise, alpha):
            fake = generator(noise, training=True)
            norm = tf.norm(slopes(real + alpha * (fake - real)), axis=1)
            score = tf.reduce_mean(critic(fake)) - tf.reduce_mean(critic(real))
            return score + 10.0 * tf.reduce_mean((norm - 1.0) ** 2)

        def fool(noise):
            return -tf.reduce_mean(critic(generator(noise, training=True)))

        criticise = train_step(tell, wrt=critic, learning_rate=1e-3)
        generate = train_step(fool, wrt=generator, learning_rate=1e-3)
        for k in range(STEPS):
            criticise(images, noise[k], mix[k])
            generate(noise[k])

    return plain, ours, lambda: [*generator.weights, *critic.weights]


@program("TensorFlow tutorial: variational autoencoder")
def vae():
    encoder, decoder = dense(6, 4), dense(2, 6)
    x, noise = tf.sigmoid(normal(16, 6)), normal(STEPS, 16, 2)

    def loss(x, noise):
        mean, logvar = tf.split(encoder(x), 2, axis=1)
        logits = decoder(mean + tf.exp(logvar / 2) * noise)
        cross = tf.nn.sigmoid_cross_entropy_with_logits(x, logits)
        kl = -0.5 * tf.reduce_sum(1 + logvar - mean**2 - tf.exp(logvar), axis=1)
        return tf.reduce_mean(tf.reduce_sum(cross, axis=1) + kl)

    def plain():
        optimizer = optimizers.Adam(1e-3)
        variables = encoder.trainable_variables + decoder.trainable_variables

        @tf.function
        def step(x, noise):
            with tf.GradientTape() as tape:
                value = loss(x, noise)
            gradients = tape.gradient(value, variables)
            optimizer.apply(gradients, variables)

        for k in range(STEPS):
            step(x, noise[k])

    def ours():
        step = train_step(loss, wrt=[encoder, decoder], learning_rate=1e-3)
        for k in range(STEPS):
            step(x, noise[k])

    return plain, ours, lambda: [*encoder.weights, *decoder.weights]


@program("TensorFlow tutorial: neural style transfer")
def style_transfer():
    features = net([8, 8, 3], layers.Conv2D(4, 3, activation="relu"))
    picture = tf.sigmoid(normal(1, 8, 8, 3))
    image = tf.Variable(picture)

    def gram(x):
        return tf.einsum("bijc,bijd->bcd", x, x) / 36.0

    style = gram(features(tf.sigmoid(normal(1, 8, 8, 3, seed=1))))
    content = features(picture)

    def loss():
        found = features(image)
        styled = tf.reduce_mean((gram(found) - style) ** 2)
        kept = tf.reduce_mean((found - content) ** 2)
        return styled + kept + 1e-3 * tf.reduce_sum(tf.image.total_variation(image))

    def plain():
        optimizer = optimizers.Adam(0.02, beta_1=0.99, epsilon=1e-1)

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                value = loss()
            gradient = tape.gradient(value, image)
            optimizer.apply_gradients([(gradient, image)])
            image.assign(tf.clip_by_value(image, 0.0, 1.0))

        optimizer.build([image])
        for _ in range(STEPS):
            step()

    def ours():
        optimizer = optimizers.Adam(0.02, beta_1=0.99, epsilon=1e-1)
        step = train_step(loss, wrt=image, optimizer=optimizer)
        for _ in range(STEPS):
            step()
            image.assign(tf.clip_by_value(image, 0.0, 1.0))

    return plain, ours, lambda: [image]


@program("TensorFlow tutorial: adversarial example (FGSM)")
def fgsm():
    model, y = dense(5, 3), digits(4)
    image = tf.Variable(normal(4, 5))

    def plain():
        def signed_gradient(image, label):
            with tf.GradientTape() as tape:
                tape.watch(image)
                value = entropy(label, model(image))
            gradient = tape.gradient(value, image)
            return tf.sign(gradient)

        for _ in range(STEPS):
            image.assign_add(0.01 * signed_gradient(tf.identity(image), y))

    def ours():
        slope = tfgrad.grad(lambda image, label: entropy(label, model(image)))
        for _ in range(STEPS):
            image.assign_add(0.01 * tf.sign(slope(image, y)))

    return plain, ours, lambda: [image]


@program("TensorFlow tutorial: integrated gradients")
def integrated_gradients():
    model, x = dense(5, 3), normal(5)
    answer = tf.Variable(tf.zeros(5))
    path = tf.linspace(0.0, 1.0, STEPS + 1)[:, None] * x

    def plain():
        def gradients_of(images):
            with tf.GradientTape() as tape:
                tape.watch(images)
                probabilities = tf.nn.softmax(model(images), axis=-1)[:, 1]
            return tape.gradient(probabilities, images)

        slopes = gradients_of(path)
        answer.assign(x * tf.reduce_mean((slopes[:-1] + slopes[1:]) / 2.0, axis=0))

    def ours():
        chosen = tfgrad.grad(lambda x: tf.reduce_sum(tf.nn.softmax(model(x))[:, 1]))
        slopes = chosen(path)
        answer.assign(x * tf.reduce_mean((slopes[:-1] + slopes[1:]) / 2.0, axis=0))

    return plain, ours, lambda: [answer]


@program("Keras example: deep Q-learning")
def dqn():
    model, target = dense(4, 2), dense(4, 2)
    states, after = normal(STEPS, 8, 4), normal(STEPS, 8, 4, seed=1)
    actions, rewards = digits(STEPS, 8) % 2, normal(STEPS, 8)
    huber = keras.losses.Huber()

    def plain():
        optimizer = optimizers.Adam(1e-3, clipnorm=1.0)
        for k in range(STEPS):
            updated = rewards[k] + 0.99 * tf.reduce_max(target(after[k]), axis=1)
            masks = tf.one_hot(actions[k], 2)
            with tf.GradientTape() as tape:
                q_values = model(states[k])
                q_action = tf.reduce_sum(tf.multiply(q_values, masks), axis=1)
                value = huber(updated, q_action)
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            if k % 10 == 0:
                target.set_weights(model.get_weights())

    def ours():
        def loss(state, action, reward, after):
            updated = reward + 0.99 * tf.reduce_max(target(after), axis=1)
            q_action = tf.gather(model(state), action, batch_dims=1)
            return huber(updated, q_action)

        adam = optimizers.Adam(1e-3, clipnorm=1.0)
        step = train_step(loss, wrt=model, optimizer=adam)
        for k in range(STEPS):
            step(states[k], actions[k], rewards[k], after[k])
            if k % 10 == 0:
                target.set_weights(model.get_weights())

    return plain, ours, lambda: [*model.weights, *target.weights]


@program("Keras example: deep deterministic policy gradient (DDPG)")
def ddpg():
    actor, critic = dense(3, 1), dense(4, 1)
    far_actor, far_critic = dense(3, 1), dense(4, 1)
    states, after = normal(STEPS, 8, 3), normal(STEPS, 8, 3, seed=1)
    actions, rewards = normal(STEPS, 8, 1, seed=2), normal(STEPS, 8, 1, seed=3)

    def q(critic, state, action):
        return critic(tf.concat([state, action], axis=1))

    def follow(far, near):
        for a, b in zip(far.variables, near.variables, strict=True):
            a.assign(0.05 * b + 0.95 * a)

    def plain():
        c_optimizer, a_optimizer = optimizers.Adam(2e-3), optimizers.Adam(1e-3)

        @tf.function
        def update(state, action, reward, after):
            with tf.GradientTape() as tape:
                y = reward + 0.99 * q(far_critic, after, far_actor(after))
                value = tf.reduce_mean((y - q(critic, state, action)) ** 2)
            gradients = tape.gradient(value, critic.trainable_variables)
            c_optimizer.apply(gradients, critic.trainable_variables)
            with tf.GradientTape() as tape:
                value = -tf.reduce_mean(q(critic, state, actor(state)))
            gradients = tape.gradient(value, actor.trainable_variables)
            a_optimizer.apply(gradients, actor.trainable_variables)

        for k in range(STEPS):
            update(states[k], actions[k], rewards[k], after[k])
            follow(far_actor, actor)
            follow(far_critic, critic)

    def ours():
        def error(state, action, reward, after):
            y = reward + 0.99 * q(far_critic, after, far_actor(after))
            return tf.reduce_mean((y - q(critic, state, action)) ** 2)

        def regret(state):
            return -tf.reduce_mean(q(critic, state, actor(state)))

        judge = train_step(error, wrt=critic, learning_rate=2e-3)
        act = train_step(regret, wrt=actor, learning_rate=1e-3)
        for k in range(STEPS):
            judge(states[k], actions[k], rewards[k], after[k])
            act(states[k])
            follow(far_actor, actor)
            follow(far_critic, critic)

    nets = actor, critic, far_actor, far_critic
    return plain, ours, lambda: [w for net in nets for w in net.weights]


@program("TensorFlow tutorial: actor-critic")
def actor_critic():
    common = layers.Dense(8, activation="relu")
    actor, critic = layers.Dense(2), layers.Dense(1)
    inputs = keras.Input([4])
    hidden = common(inputs)
    model = keras.Model(inputs, [actor(hidden), critic(hidden)])
    lengths = np.random.default_rng(0).integers(4, 12, size=STEPS)
    huber = keras.losses.Huber(reduction="sum")

    def episode(k):
        n = lengths[k]
        return normal(n, 4, seed=k), digits(n, seed=k) % 2, normal(n, 1, seed=k + 1)

    def loss(states, actions, returns):
        logits, values = model(states)
        chosen = tf.gather(tf.nn.log_softmax(logits), actions, batch_dims=1)
        advantage = tf.stop_gradient(returns - values)
        return huber(values, returns) - tf.reduce_sum(chosen[:, None] * advantage)

    def plain():
        optimizer = optimizers.Adam(0.01)

        @tf.function(reduce_retracing=True)
        def step(states, actions, returns):
            with tf.GradientTape() as tape:
                value = loss(states, actions, returns)
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        for k in range(STEPS):
            step(*episode(k))

    def ours():
        step = train_step(loss, wrt=model, learning_rate=0.01)
        for k in range(STEPS):
            step(*episode(k))

    return plain, ours, lambda: model.weights


@program("Keras example: few-shot learning with Reptile")
def reptile():
    model, x, y = dense(4, 3), normal(STEPS, 6, 4), digits(STEPS, 6)

    def meta(old, rate):
        pairs = zip(model.get_weights(), old, strict=True)
        model.set_weights([a + (b - a) * rate for b, a in pairs])

    def plain():
        optimizer = optimizers.SGD(0.05)

        @tf.function
        def inner(x, y):
            with tf.GradientTape() as tape:
                value = entropy(y, model(x))
            gradients = tape.gradient(value, model.trainable_weights)
            optimizer.apply(gradients, model.trainable_weights)

        for k in range(0, STEPS, 3):
            old = model.get_weights()
            for i in range(3):
                inner(x[k + i], y[k + i])
            meta(old, 0.25)

    def ours():
        sgd = {"optimizer": "sgd", "learning_rate": 0.05}
        inner = train_step(lambda x, y: entropy(y, model(x)), wrt=model, **sgd)
        for k in range(0, STEPS, 3):
            old = model.get_weights()
            for i in range(3):
                inner(x[k + i], y[k + i])
            meta(old, 0.25)

    return plain, ours, lambda: model.weights


@program("Model-agnostic meta-learning (MAML), sines")
def maml():
    sizes = [[1, 8], [8], [8, 1], [1]]
    weights = [tf.Variable(normal(*size, seed=i) * 0.5) for i, size in enumerate(sizes)]
    x = normal(STEPS, 10, 1)
    y = tf.sin(x + tf.range(float(STEPS))[:, None, None])

    def loss(weights, x, y):
        a, b, c, d = weights
        return tf.reduce_mean((tf.tanh(x @ a + b) @ c + d - y) ** 2)

    def plain():
        optimizer = optimizers.Adam(1e-2)
        optimizer.build(weights)

        @tf.function
        def step(x, y):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    value = loss(weights, x[:5], y[:5])
                slopes = inner.gradient(value, weights)
                moved = [w - 0.1 * s for w, s in zip(weights, slopes, strict=True)]
                value = loss(moved, x[5:], y[5:])
            gradients = outer.gradient(value, weights)
            optimizer.apply(gradients, weights)

        for k in range(STEPS):
            step(x[k], y[k])

    def ours():
        def adapted(x, y):
            here = [tf.identity(w) for w in weights]
            slopes = tfgrad.grad(loss)(here, x[:5], y[:5])
            moved = [w - 0.1 * s for w, s in zip(here, slopes, strict=True)]
            return loss(moved, x[5:], y[5:])

        step = train_step(adapted, wrt=weights, learning_rate=1e-2)
        for k in range(STEPS):
            step(x[k], y[k])

    return plain, ours, lambda: weights


@program("Physics-informed network (PINN): u'' = -sin x")
def pinn():
    model, x = dense(1, 1), tf.linspace(0.0, 3.0, 20)[:, None]

    def plain():
        optimizer = optimizers.Adam(1e-2)

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                with tf.GradientTape() as second:
                    second.watch(x)
                    with tf.GradientTape() as first:
                        first.watch(x)
                        u = model(x)
                    du = first.gradient(u, x)
                ddu = second.gradient(du, x)
                ends = tf.reduce_sum(model(tf.constant([[0.0], [np.pi]])) ** 2)
                value = tf.reduce_mean((ddu + tf.sin(x)) ** 2) + ends
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        for _ in range(STEPS):
            step(x)

    def ours():
        second = tfgrad.derivative(tfgrad.derivative(model))

        def loss(x):
            ends = tf.reduce_sum(model(tf.constant([[0.0], [np.pi]])) ** 2)
            return tf.reduce_mean((second(x) + tf.sin(x)) ** 2) + ends

        step = train_step(loss, wrt=model, learning_rate=1e-2)
        for _ in range(STEPS):
            step(x)

    return plain, ours, lambda: model.weights


@program("Keras example: denoising diffusion (DDPM), averaged weights")
def ddpm():
    network, average = dense(5, 4), dense(5, 4)
    average.set_weights(network.get_weights())
    images, noise = normal(8, 4), normal(STEPS, 8, 4)
    times = tf.abs(tf.sin(normal(STEPS, 8, 1, seed=1)))

    def noised(images, noise, t):
        mixed = tf.sqrt(1 - t) * images + tf.sqrt(t) * noise
        return tf.concat([mixed, t], axis=1)

    def follow():
        for a, b in zip(average.weights, network.weights, strict=True):
            a.assign(0.9 * a + 0.1 * b)

    def plain():
        optimizer = optimizers.Adam(1e-3)

        @tf.function
        def step(images, noise, t):
            with tf.GradientTape() as tape:
                predicted = network(noised(images, noise, t), training=True)
                value = squares(noise, predicted)
            gradients = tape.gradient(value, network.trainable_weights)
            optimizer.apply(gradients, network.trainable_weights)

        for k in range(STEPS):
            step(images, noise[k], times[k])
            follow()

    def ours():
        def loss(images, noise, t):
            return squares(noise, network(noised(images, noise, t), training=True))

        step = train_step(loss, wrt=network, learning_rate=1e-3)
        for k in range(STEPS):
            step(images, noise[k], times[k])
            follow()

    return plain, ours, lambda: [*network.weights, *average.weights]


@program("TensorFlow tutorial: text generation with a GRU")
def gru_text():
    stack = layers.Embedding(3, 4), layers.GRU(6, return_sequences=True)
    model = net([None], *stack, layers.Dense(3), dtype="int64")
    text = digits(STEPS, 4, 9)

    def plain():
        # Momentum: Keras's Adam takes repeated rows of an embedding's gradient wrongly.
        optimizer = optimizers.SGD(0.1, momentum=0.9)

        @tf.function(reduce_retracing=True)
        def step(text):
            with tf.GradientTape() as tape:
                predicted = model(text[:, :-1], training=True)
                value = entropy(text[:, 1:], predicted)
            gradients = tape.gradient(value, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

        for k in range(STEPS):
            step(text[k, :, : 5 + k % 5])

    def ours():
        def loss(text):
            return entropy(text[:, 1:], model(text[:, :-1], training=True))

        momentum = optimizers.SGD(0.1, momentum=0.9)
        step = train_step(loss, wrt=model, optimizer=momentum)
        for k in range(STEPS):
            step(text[k, :, : 5 + k % 5])

    return plain, ours, lambda: model.weights


@program("Recommendation by matrix factorisation")
def matrix_factorisation():
    users, items = tf.Variable(normal(9, 2)), tf.Variable(normal(7, 2, seed=1))
    rows, columns = digits(STEPS, 8), digits(STEPS, 8, seed=1) + 2
    ratings = normal(STEPS, 8)

    def loss(row, column, rating):
        u, v = tf.gather(users, row), tf.gather(items, column)
        return tf.reduce_mean((tf.reduce_sum(u * v, axis=1) - rating) ** 2)

    def plain():
        optimizer = optimizers.Adam(0.05)
        optimizer.build([users, items])

        @tf.function
        def step(row, column, rating):
            with tf.GradientTape() as tape:
                value = loss(row, column, rating)
            gradients = tape.gradient(value, [users, items])
            # Keras's Adam is wrong where a row is there twice.
            gradients = [tf.convert_to_tensor(g) for g in gradients]
            optimizer.apply(gradients, [users, items])

        for k in range(STEPS):
            step(rows[k], columns[k], ratings[k])

    def ours():
        step = train_step(loss, wrt=[users, items], learning_rate=0.05)
        for k in range(STEPS):
            step(rows[k], columns[k], ratings[k])

    return plain, ours, lambda: [users, items]


@program("TensorFlow guide: mixed precision, a loop of one's own")
def mixed_precision():
    half = keras.DTypePolicy("mixed_float16")
    hidden = layers.Dense(8, activation="relu", dtype=half)
    model = net([4], hidden, layers.Dense(3, dtype="float32"))
    x, y = normal(32, 4), digits(32)
    # Its first steps overflow, and are left out.
    scaled = optimizers.LossScaleOptimizer(optimizers.Adam(), initial_scale=2.0**40)

    def plain():
        scaled.build(model.trainable_variables)

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                value = entropy(y, model(x, training=True))
                scaled_loss = scaled.scale_loss(value)
            gradients = tape.gradient(scaled_loss, model.trainable_variables)
            scaled.apply(gradients, model.trainable_variables)

        for _ in range(STEPS):
            step(x, y)

    def ours():
        def loss(x, y):
            return entropy(y, model(x, training=True))

        step = train_step(loss, wrt=model, optimizer=scaled)
        for _ in range(STEPS):
            step(x, y)

    return plain, ours, lambda: [*model.weights, scaled.dynamic_scale]


@program("Accumulated gradients, with a short last window")
def accumulation():
    model, x, y = dense(4, 1), normal(STEPS, 8, 4), normal(STEPS, 8, 1)
    window = 4  # 30 batches: seven windows of four, and one of two

    def plain():
        optimizer = optimizers.Adam(1e-2)
        sums = [tf.Variable(tf.zeros_like(w)) for w in model.trainable_variables]

        @tf.function
        def accumulate(x, y):
            with tf.GradientTape() as tape:
                value = squares(y, model(x))
            gradients = tape.gradient(value, model.trainable_variables)
            for total, gradient in zip(sums, gradients, strict=True):
                total.assign_add(gradient)

        def apply(count):
            optimizer.apply([s / count for s in sums], model.trainable_variables)
            for total in sums:
                total.assign(tf.zeros_like(total))

        for k in range(STEPS):
            accumulate(x[k], y[k])
            if (k + 1) % window == 0:
                apply(window)
        if STEPS % window:
            apply(STEPS % window)

    def ours():
        def loss(x, y):  # of a window of batches, one after the other
            each = tf.map_fn(lambda b: squares(b[1], model(b[0])), (x, y), tf.float32)
            return tf.reduce_mean(each)

        step = train_step(loss, wrt=model, learning_rate=1e-2)
        for k in range(0, STEPS, window):
            step(x[k : k + window], y[k : k + window])

    return plain, ours, lambda: model.weights


def trained(program, index):
    keras.utils.set_random_seed(1)
    *versions, variables = program()
    versions[index]()
    return [np.array(tf.convert_to_tensor(v)) for v in variables()]


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_program_trains_to_the_same_numbers(title):
    plain, ours = (trained(PROGRAMS[title], index) for index in (0, 1))

    for a, b in zip(ours, plain, strict=True):
        # Sums in another order, by an optimizer that divides by their size.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def lines_of(title):
    *versions, _ = PROGRAMS[title]()
    bodies = [inspect.getsource(version).splitlines()[1:] for version in versions]
    return [
        sum(bool(line.strip()) and "#" not in line.split()[0] for line in body)
        for body in bodies
    ]


def test_there_are_twenty_programs_each_shorter_with_train_step():
    counts = [lines_of(title) for title in PROGRAMS]

    assert len(counts) == 20
    assert all(ours < plain for plain, ours in counts)


def test_the_page_has_the_table_of_them():
    rows = re.findall(r"^\| (.*) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.M)

    assert rows == [(title, *map(str, lines_of(title))) for title in PROGRAMS]
